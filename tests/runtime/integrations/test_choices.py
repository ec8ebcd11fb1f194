"""Choices read by a model of transformers that is steered."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from fssa_runtime.errors import InputError
from fssa_runtime.integrations.transformers import modulate
from fssa_runtime.models.language_model import LanguageModel

from ..conditioned import CHOICES, random_conditioning
from .batches import latents, token_batch


@pytest.mark.parametrize("adapter", [None, "before", "after"])
def test_choices_are_read_by_the_base_itself(
    adapter: str | None, model: LanguageModel, theirs: Any
) -> None:
    """The latent is the engine's; neither users nor an adapter in the model change it."""
    conditioning = random_conditioning(model, "mixed")
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    if adapter == "before":
        theirs = peft.get_peft_model(theirs, config)
    steered = modulate(theirs, conditioning)
    if adapter == "after":
        theirs = peft.get_peft_model(theirs, config)
    theirs.train()
    before = theirs(input_ids=token_batch(1)).logits
    expected = conditioning.infer(model, CHOICES)
    attentions = [m for name, m in theirs.named_modules() if name.endswith("self_attn")]
    for attention in attentions:
        attention.attention_dropout = 0.5  # of training, and not of reading
    with steered.users(latents(3)):
        got = steered.infer(model.tokenizer, CHOICES)
    for attention in attentions:
        attention.attention_dropout = 0.0
    assert (got - expected).abs().max() <= 1e-4
    assert (got - conditioning.infer(model, CHOICES[:2])).abs().max() > 1e-3
    assert theirs.training
    assert torch.equal(theirs(input_ids=token_batch(1)).logits, before)
    steered.remove()
    with pytest.raises(InputError, match="need an encoder"):
        modulate(theirs, conditioning.modulator).infer(model.tokenizer, CHOICES)


@pytest.mark.parametrize("trainable", [False, True])
def test_reading_choices_leaves_what_is_trained(
    trainable: bool, model: LanguageModel, theirs: Any
) -> None:
    """With ``trainable`` an adapter that is in the model already is frozen, and stays so."""
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, config)
    steered = modulate(theirs, random_conditioning(model, "mixed"), trainable=trainable)

    def trained() -> list[str]:
        return [name for name, p in theirs.named_parameters() if p.requires_grad]

    before = trained()
    assert any("lora_A" in name for name in before) is not trainable
    steered.infer(model.tokenizer, CHOICES)
    assert trained() == before


def test_reading_choices_leaves_every_module_in_its_mode(model: LanguageModel, theirs: Any) -> None:
    theirs.train()
    theirs.model.layers[1].eval()
    before = {name: module.training for name, module in theirs.named_modules()}
    modulate(theirs, random_conditioning(model, "mixed")).infer(model.tokenizer, CHOICES)
    assert {name: module.training for name, module in theirs.named_modules()} == before
