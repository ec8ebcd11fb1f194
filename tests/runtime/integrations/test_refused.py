"""What models of transformers refuse, and what a pass that failed leaves behind: nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fssa_runtime.conditioning.layout import ModulatorConfig
from fssa_runtime.conditioning.modulator import Modulator
from fssa_runtime.conditioning.user_weights import UserWeights
from fssa_runtime.errors import InputError
from fssa_runtime.integrations.transformers import base_shape, modulate
from fssa_runtime.models.language_model import LanguageModel

from ..conditioned import CHOICES, LATENT_DIM, random_conditioning
from ..models import reference_model, write_model
from .batches import latents, token_batch


def test_wrong_numbers_of_rows(model: LanguageModel, theirs: Any) -> None:
    steered = modulate(theirs, random_conditioning(model, "gated"))
    with steered.users(latents(2)):
        for rows in (1, 3, 4):  # 4 too: only generate repeats rows
            with pytest.raises(InputError, match=f"batch of {rows} rows: expected 2"):
                theirs(token_batch(rows))
            with pytest.raises(InputError, match=f"batch of {rows} rows: expected 2"):
                theirs.generate(token_batch(rows), max_new_tokens=2)
    with pytest.raises(InputError, match="batch of 3 rows: expected 2"):
        theirs(token_batch(3), latents=latents(2))
    base = theirs(token_batch(3)).logits  # a pass that failed leaves nothing behind
    steered.remove()
    assert torch.equal(base, theirs(token_batch(3)).logits)


@pytest.mark.parametrize("then", ["base", "backbone", "generate", "infer"])
def test_an_interrupted_pass_leaves_no_latents_behind(
    then: str, model: LanguageModel, theirs: Any
) -> None:
    steered = modulate(theirs, random_conditioning(model, "mixed"))
    tokens, z = token_batch(1), latents(2)

    def computed() -> torch.Tensor:
        if then == "base":
            return theirs(tokens).logits
        if then == "infer":
            return steered.infer(model.tokenizer, CHOICES)
        with steered.users(z[1]):
            if then == "backbone":
                return theirs.model(tokens).last_hidden_state
            options = {"max_new_tokens": 1, "output_logits": True, "pad_token_id": 0}
            return theirs.generate(tokens, **options, return_dict_in_generate=True).logits[0]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    expected = computed()
    hook = theirs.model.norm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        theirs(tokens, latents=z[:1])
    hook.remove()
    assert torch.equal(computed(), expected)


def test_bad_users(model: LanguageModel, theirs: Any) -> None:
    steered = modulate(theirs, random_conditioning(model, "gated"), latents={"ana": latents(1)[0]})
    for whose, message in [
        ([], "at least one"),
        (["bob"], "'bob' is not known: expected one of ana"),
        (torch.zeros(4), r"shape \[5\], got \[4\]"),
        ([torch.full((5,), float("nan"))], "finite"),
        ({"ana": float("inf")}, "share of 'ana'"),
        ([{}], "no shares"),
        ([3], "got int"),
        ([UserWeights.of_row(torch.zeros(2))], "a row of"),
    ]:
        with pytest.raises(InputError, match=message), steered.users(whose):  # type: ignore[arg-type]
            pass
    with pytest.raises(InputError, match=r"tensor \[B, Z\]"):
        theirs(token_batch(1), latents=[[1.0]])
    with pytest.raises(InputError, match="finite"):
        modulate(
            theirs,
            random_conditioning(model, "gated").modulator,
            latents={"x": torch.full((5,), float("nan"))},
        )


def test_models_that_do_not_fit(model: LanguageModel, theirs: Any, tmp_path: Path) -> None:
    conditioning = random_conditioning(model, "gated")
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50)
    )
    with pytest.raises(InputError, match=r"q_proj.*named c_attn, c_fc, c_proj"):
        modulate(gpt2, conditioning.modulator)
    two = torch.nn.ModuleDict({"eyes": theirs.model, "mind": copy.deepcopy(theirs.model)})
    with pytest.raises(InputError, match=r"several stacks.*eyes\.layers, mind\.layers"):
        modulate(two, conditioning.modulator)
    mixture = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=50, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
        )
    )  # fmt: skip
    with pytest.raises(InputError, match=r"has experts \(mlp\.experts\): .* gate_proj"):
        modulate(mixture, conditioning.modulator)
    wider = reference_model(write_model(tmp_path / "wide", "mistral-full"))  # head_dim 16, not 12
    with pytest.raises(InputError, match=r"layer 0: q_proj.*\[48, 48\], the model has \[64, 48\]"):
        modulate(wider, conditioning.modulator)
    theirs.model.layers = theirs.model.layers[:2]
    with pytest.raises(InputError, match="made for 3 layers, the model has 2"):
        modulate(theirs, conditioning.modulator)


@pytest.mark.parametrize("site", ["gate", "up", "down"])
def test_a_shared_expert_is_not_taken_for_the_layers_mlp(site: str) -> None:
    config = transformers.Qwen2MoeConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=24, shared_expert_intermediate_size=48,
    )  # fmt: skip
    mixture = transformers.Qwen2MoeForCausalLM(config)

    def modulator(*sites: str) -> Modulator:
        families = [{"family": "gated", "sites": sites, "rank": 2}]
        config = ModulatorConfig.model_validate({"latent_dim": LATENT_DIM, "families": families})
        return Modulator(config, base_shape(mixture))

    with pytest.raises(InputError, match=rf"layer 0 .*has experts.*{site}_proj"):
        modulate(mixture, modulator("q", site))
    modulate(mixture, modulator("q", "v", "o"))


@pytest.mark.parametrize("family", ["gated", "film"])
def test_not_twice_and_not_over_other_hooks(family: str, model: LanguageModel, theirs: Any) -> None:
    conditioning = random_conditioning(model, family)
    steered = modulate(theirs, conditioning)
    with pytest.raises(InputError, match=r"modulated already: expected remove\(\)"):
        modulate(theirs, conditioning)
    steered.remove()
    if family == "gated":
        theirs.model.layers[1].mlp.up_proj.forward = lambda x: x
        with pytest.raises(InputError, match="layer 1: up_proj has a forward of its own"):
            modulate(theirs, conditioning)
        assert not theirs.model.layers[0]._forward_pre_hooks  # left as it was


def test_gradient_checkpointing_is_refused_where_it_would_be_wrong(
    model: LanguageModel, theirs: Any
) -> None:
    steered = modulate(theirs, random_conditioning(model, "gated"), trainable=True)
    theirs.train()
    theirs.gradient_checkpointing_enable()
    theirs(token_batch(2))  # the base alone is not concerned
    with pytest.raises(InputError, match="gradient checkpointing"), steered.users(latents(2)):
        theirs(token_batch(2))
    with torch.no_grad(), steered.users(latents(2)):
        theirs(token_batch(2))
