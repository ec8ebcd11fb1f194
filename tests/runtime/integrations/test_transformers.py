"""Models of transformers with a user in every row: against our decoder and against merged weights.

Agreement is asserted on logits of random models whose users differ much, never on texts.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from fssa_runtime.conditioning.layout import ModulatorConfig
from fssa_runtime.conditioning.merge import merged
from fssa_runtime.conditioning.modulator import Modulator
from fssa_runtime.conditioning.user_weights import UserWeights
from fssa_runtime.errors import InputError
from fssa_runtime.integrations.transformers import base_fingerprint, base_shape, load, modulate
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.models.packed import PackedOptions

from ..conditioned import FAMILIES, LATENT_DIM, random_conditioning, random_row, small_model
from ..models import CONFIGURATIONS, reference_model, write_model
from .batches import LENGTH, latents, token_batch


def decoder_logits(
    model: LanguageModel, conditioning: Any, table: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """``[B, S, V]`` of our decoder; row i is the user of ``table[i]``."""
    packed = PackedOptions.pack(
        [(list(row[:-1]), [row[-1]]) for row in tokens.tolist()], torch.device("cpu")
    )
    slots = packed.per_token(torch.arange(len(tokens))).int()
    hidden = packed.hidden(model.decoder, conditioning.modulator.bind(table, slots))
    return model.decoder.logits(hidden).unflatten(0, tokens.shape)


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, "mixed") for name in CONFIGURATIONS] + [("llama", family) for family in FAMILIES],
)
def test_logits_equal_our_decoder(name: str, family: str, tmp_path: Path) -> None:
    ours = small_model(tmp_path / "model", name)
    conditioning = random_conditioning(ours, family)
    rows = [random_row(conditioning, seed) for seed in (1, 2, 3)]
    nobody = 2  # not the first of the batch, as in the table
    table = torch.stack([*rows[:nobody], conditioning.modulator.layout.identity(), *rows[nobody:]])
    people = [*map(UserWeights.of_row, rows[:nobody]), None, UserWeights.of_row(rows[nobody])]
    reference = reference_model(ours.folder)
    tokens = token_batch(4)
    with torch.no_grad():
        expected = decoder_logits(ours, conditioning, table, tokens)
        base = reference(tokens).logits
        steered = modulate(reference, conditioning)
        with steered.users(people):
            got = reference(tokens).logits
        assert torch.equal(reference(tokens).logits, base)  # outside of the block
    assert (got - expected).abs().max() <= 1e-4
    changed = (got - base).abs().amax((1, 2))
    if family not in ("static", "authors"):
        assert changed[nobody] <= 1e-5
        changed[nobody] = torch.inf
    assert changed.min() > 1e-2  # agreement would mean little else


@pytest.mark.parametrize("kind", ["Granite", "Olmo2", "Starcoder2"])
def test_architectures_our_decoder_does_not_have(kind: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        initializer_range=0.15,
    )
    reference = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    sites = ("q", "k", "v", "o") + (("gate", "up", "down") if kind != "Starcoder2" else ())
    families = [{"family": "gated", "sites": sites, "rank": 3}, {"family": "film"}]
    modulator = Modulator(
        ModulatorConfig.model_validate({"latent_dim": LATENT_DIM, "families": families}),
        base_shape(reference),
    )
    with torch.no_grad():
        for parameter in modulator.parameters():
            parameter.normal_(std=0.2)
    tokens = torch.randint(0, 256, (2, 9))
    z = latents(2)
    with torch.no_grad():
        with modulate(reference, modulator).users(z):
            got = reference(tokens).logits
        for row, latent in enumerate(z):
            with merged(
                copy.deepcopy(reference), modulator, modulator.rows(latent[None])[0]
            ) as own:
                assert (got[row] - own(tokens[row : row + 1]).logits[0]).abs().max() <= 1e-4


def test_generate_for_a_padded_batch_of_users(model: LanguageModel, theirs: Any) -> None:
    """Every row, its scores included, is what its user gets alone from merged weights."""
    conditioning = random_conditioning(model, "mixed")
    texts = ["one", "a rather longer prompt", "three"]
    tokenizer = model.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    z = latents(3)
    rows = [conditioning.row(latent) for latent in z]
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    steered = modulate(theirs, conditioning, latents={"ana": z[0]})
    with steered.users(["ana", z[1], UserWeights.of_row(rows[2])]):
        together = theirs.generate(**batch, **options)
    steered.remove()
    for index, text in enumerate(texts):
        alone = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        with merged(theirs, conditioning.modulator, rows[index]) as own:
            wanted = own.generate(**alone, **options)
        for ours, expected in zip(together.scores, wanted.scores, strict=True):
            assert (ours[index] - expected[0]).abs().max() <= 1e-4


def test_beams_and_several_answers_repeat_rows(model: LanguageModel, theirs: Any) -> None:
    conditioning = random_conditioning(model, "gated")
    tokens, z = token_batch(2), latents(2)
    steered = modulate(theirs, conditioning)
    beams = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    with steered.users(z):
        together = theirs.generate(tokens, **beams, pad_token_id=0)
        sampled = theirs.generate(
            tokens, max_new_tokens=1, do_sample=True, num_return_sequences=4, pad_token_id=0
        )
    assert together.shape[0] == 4
    assert sampled.shape[0] == 8
    for index in range(2):
        with steered.users(z[index]):
            alone = theirs.generate(tokens[index : index + 1], **beams, pad_token_id=0)
        width = min(alone.shape[1], together.shape[1])
        assert torch.equal(together[2 * index : 2 * index + 2, :width], alone[:, :width])
    with steered.users(z[1]):
        other = theirs.generate(tokens[:1], **beams, pad_token_id=0)
    assert not torch.equal(other[:, LENGTH:], together[:2, LENGTH : other.shape[1]])


def test_mixtures_lie_between(model: LanguageModel, theirs: Any) -> None:
    conditioning = random_conditioning(model, "mixed")
    z, tokens = latents(2), token_batch(1)
    steered = modulate(theirs, conditioning, latents={"ana": z[0], "ben": z[1]})
    blended = conditioning.blend([(0.3, z[0]), (0.9, z[1])])
    with torch.no_grad():
        with steered.users({"ana": 0.3, "ben": 0.9}):
            got = theirs(tokens).logits
        with steered.users(blended):
            assert (theirs(tokens).logits - got).abs().max() <= 1e-5
        with steered.users("ana"):
            assert (theirs(tokens).logits - got).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["gated-some", "core", "film"])
def test_gradients_equal_our_decoders(family: str, tmp_path: Path) -> None:
    ours = small_model(tmp_path / "model")
    conditioning = random_conditioning(ours, family)
    reference, tokens = reference_model(ours.folder), token_batch(2)

    def gradients(loss: torch.Tensor, z: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, [z, *conditioning.modulator.parameters()]))

    z = latents(2).requires_grad_()
    table = conditioning.modulator.rows(z)
    expected = gradients(decoder_logits(ours, conditioning, table, tokens).square().sum(), z)
    steered = modulate(reference, conditioning, trainable=True)
    with steered.users(z):
        loss = reference(tokens).logits.square().sum()
    got = gradients(loss, z)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    steered.remove()
    assert all(p.requires_grad for p in reference.parameters())
    assert not hasattr(reference, "fssa")


def test_without_training_only_latents_have_gradients(model: LanguageModel, theirs: Any) -> None:
    conditioning = random_conditioning(model, "mixed")
    theirs.requires_grad_(False)
    z = latents(2).requires_grad_()
    steered = modulate(theirs, conditioning)
    with steered.users(z):
        theirs(token_batch(2)).logits.sum().backward()
    assert z.grad is not None
    assert (z.grad.abs().amax(1) > 0).all()
    assert all(p.grad is None for p in conditioning.modulator.parameters())


def test_a_trainer_trains_the_conditioning(
    model: LanguageModel, theirs: Any, tmp_path: Path
) -> None:
    """transformers' own Trainer, unchanged: two users whose texts differ, from latents alone."""
    conditioning = random_conditioning(model, "gated")
    with torch.no_grad():
        for parameter in conditioning.modulator.lora_b.values():
            parameter.zero_()  # as new
    z, texts = latents(2), token_batch(2)
    data = [
        {
            "input_ids": texts[i],
            "labels": texts[i],
            "latents": z[i],
            "attention_mask": texts[i] >= 0,
        }
        for i in (0, 1)
    ] * 8
    modulate(theirs, conditioning, trainable=True)
    frozen = theirs.model.layers[0].mlp.up_proj.weight.clone()
    before = theirs(input_ids=texts, labels=texts, latents=z).loss.item()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=4,
        learning_rate=1e-2,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    transformers.Trainer(model=theirs, args=arguments, train_dataset=data).train()
    after = theirs(input_ids=texts, labels=texts, latents=z).loss.item()
    swapped = theirs(input_ids=texts, labels=texts, latents=z.flip(0)).loss.item()
    assert after < 0.7 * before
    assert swapped > after + 0.2  # each user's own text was learnt, not both by everybody
    assert torch.equal(theirs.model.layers[0].mlp.up_proj.weight, frozen)


def test_autocast_computes_in_the_narrow_type(model: LanguageModel, theirs: Any) -> None:
    conditioning = random_conditioning(model, "mixed")
    z, tokens, dtypes = latents(2), token_batch(2), []
    theirs.model.layers[1].mlp.up_proj.register_forward_hook(
        lambda module, inputs, output: dtypes.append(output.dtype)
    )
    with torch.no_grad(), modulate(theirs, conditioning).users(z):
        wide = theirs(tokens).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            narrow = theirs(tokens).logits
    assert dtypes == [torch.float32, torch.bfloat16]
    assert (narrow - wide).abs().max() <= 0.1 * wide.abs().max()


@pytest.mark.parametrize("first", ["peft", "modulate"])
def test_peft_adapters_add_to_it(first: str, model: LanguageModel, theirs: Any) -> None:
    conditioning = random_conditioning(model, "gated")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    z, tokens = latents(2), token_batch(2)
    torch.manual_seed(5)
    if first == "peft":
        wrapped = peft.get_peft_model(theirs, config)
        steered = modulate(wrapped, conditioning)
    else:
        steered = modulate(theirs, conditioning)
        wrapped = peft.get_peft_model(theirs, config)
    wrapped.eval()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), steered.users(z):
        got = wrapped(input_ids=tokens).logits
        texts = wrapped.generate(input_ids=tokens, **options)
    steered.remove()
    plain = wrapped.merge_and_unload()
    with torch.no_grad():
        for row in range(2):
            with merged(plain, conditioning.modulator, conditioning.row(z[row])) as own:
                expected = own(tokens[row : row + 1]).logits[0]
                written = own.generate(tokens[row : row + 1], **options)
            assert (got[row] - expected).abs().max() <= 1e-4
            assert torch.equal(texts[row], written[0])


def test_a_checkpoint_loads_onto_a_model_in_memory(
    model: LanguageModel, theirs: Any, tmp_path: Path
) -> None:
    assert base_fingerprint(theirs) == model.fingerprint
    saved = random_conditioning(model, "mixed")
    saved.save(tmp_path / "c")
    loaded = load(tmp_path / "c", theirs)
    assert torch.equal(loaded.row(latents(1)[0]), saved.row(latents(1)[0]))
    other = reference_model(write_model(tmp_path / "other", seed=1))
    with pytest.raises(InputError, match="was made for"):
        load(tmp_path / "c", other)
    with pytest.raises(InputError, match=r"another base.*\.modulator"):
        modulate(other, loaded)
    modulate(other, loaded.modulator)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_fingerprints_agree_with_those_of_folders(name: str, tmp_path: Path) -> None:
    ours = small_model(tmp_path / "model", name)
    assert base_fingerprint(reference_model(ours.folder)) == ours.fingerprint
    assert base_fingerprint(reference_model(ours.folder, torch.bfloat16)) == ours.fingerprint


@pytest.mark.parametrize("trainable", [False, True])
def test_removed_without_a_trace(trainable: bool, model: LanguageModel, theirs: Any) -> None:
    conditioning = random_conditioning(model, "mixed")
    names, keys = [n for n, _ in theirs.named_modules()], list(theirs.state_dict())
    before = {module: dict(vars(module)) for module in theirs.modules()}
    for _ in range(2):
        steered = modulate(theirs, conditioning, trainable=trainable)
        copied = copy.deepcopy(theirs)
        assert base_fingerprint(theirs) == model.fingerprint  # what is added does not count
        steered.remove()
        steered.remove()
    assert [n for n, _ in theirs.named_modules()] == names
    assert list(theirs.state_dict()) == keys
    for module, attributes in before.items():
        assert vars(module).keys() == attributes.keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    tokens = token_batch(1)
    assert torch.equal(copied(tokens).logits, theirs(tokens).logits)  # a copy is nobody's


def test_a_copy_is_not_steered_by_the_original(model: LanguageModel, theirs: Any) -> None:
    tokens, z = token_batch(1), latents(1)
    base = theirs(tokens).logits
    steered = modulate(theirs, random_conditioning(model, "mixed"))
    reference = copy.deepcopy(theirs)
    with steered.users(z):
        assert torch.equal(reference(tokens).logits, base)
        assert (theirs(tokens).logits - base).abs().max() > 1e-2
