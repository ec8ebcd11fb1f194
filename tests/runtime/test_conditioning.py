"""Families, table and checkpoints of the conditioning, on small random models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from fssa_runtime.conditioning.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Conditioning,
    load_conditioning,
)
from fssa_runtime.conditioning.layout import FamilyConfig, ModulatorConfig, RowLayout
from fssa_runtime.conditioning.merge import merged, reference_answer_logprobs
from fssa_runtime.conditioning.modulator import Modulator
from fssa_runtime.conditioning.table import ModulationTable
from fssa_runtime.conditioning.user_weights import UserWeights
from fssa_runtime.errors import InputError
from fssa_runtime.llm import LLM
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.models.packed import PackedOptions
from fssa_runtime.request import SamplingParams
from fssa_runtime.training.policy_options import answer_logprobs

from .conditioned import CHOICES, FAMILIES, random_conditioning, random_row, small_model
from .models import reference_model

PROMPTS = ("one", "a rather longer prompt than the other", "three three three", "four")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small_model(tmp_path_factory.mktemp("base") / "model")


def logprobs_of(completions: list, index: int) -> torch.Tensor:
    return torch.tensor(completions[index].logprobs)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_its_own_user(family: str, model: LanguageModel) -> None:
    """A batch of three users and nobody equals each alone, and each merged by hand."""
    conditioning = random_conditioning(model, family)
    llm = LLM(model, conditioning, prefix_cache=False)
    rows = [random_row(conditioning, seed) for seed in (1, 2, 3)]
    users = [None, *map(UserWeights.of_row, rows)]
    rows = [conditioning.modulator.layout.identity(), *rows]
    sampling = SamplingParams(max_tokens=12)
    together = llm.run([llm.request(p, u, sampling) for p, u in zip(PROMPTS, users, strict=True)])
    reference = reference_model(model.folder)
    for index, (prompt, user) in enumerate(zip(PROMPTS, users, strict=True)):
        ours = logprobs_of(together, index)
        tokens = together[index].tokens
        alone = llm.run([llm.request(prompt, user, forced_tokens=tokens)])
        assert (ours - logprobs_of(alone, 0)).abs().max() <= 1e-4
        prompt_tokens = model.chat_tokens(prompt)
        with merged(reference, conditioning.modulator, rows[index]) as own:
            theirs = reference_answer_logprobs(own, prompt_tokens, tokens)
        assert (ours - theirs).abs().max() <= 1e-4
        if user is not None and family != "static":
            other = rows[index % 3 + 1]
            with merged(reference, conditioning.modulator, other) as wrong:
                mixed_up = reference_answer_logprobs(wrong, prompt_tokens, tokens)
            # The check above would notice another user's weights.
            assert (ours - mixed_up).abs().max() > 1e-2


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("static", "authors")])
def test_nobody_is_exactly_the_base(family: str, model: LanguageModel) -> None:
    conditioning = random_conditioning(model, family)
    table = ModulationTable(conditioning.modulator.layout, 2)
    packed = PackedOptions.pack([(list(b"some text"), list(b"more"))], torch.device("cpu"))
    slots = torch.zeros(len(packed.tokens), dtype=torch.int32)
    with torch.no_grad():
        base = packed.hidden(model.decoder)
        nobody = packed.hidden(model.decoder, conditioning.modulator.bind(table.rows, slots))
    assert torch.equal(base, nobody)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "factors"])
def test_a_new_modulator_changes_nothing(family: str, model: LanguageModel) -> None:
    config = ModulatorConfig.model_validate({"latent_dim": 4, "families": FAMILIES[family]})
    modulator = Modulator(config, model.decoder.config)
    table = torch.zeros(2, modulator.layout.width)
    table[:, : modulator.layout.generated_width] = modulator.rows(torch.randn(2, 4)).detach()
    packed = PackedOptions.pack([(list(b"ab"), list(b"cd"))], torch.device("cpu"))
    slots = torch.ones(4, dtype=torch.int32)
    with torch.no_grad():
        base = packed.hidden(model.decoder)
        new = packed.hidden(model.decoder, modulator.bind(table, slots))
    assert (base - new).abs().max() <= (0.0 if "film" not in str(FAMILIES[family]) else 1e-6)


@pytest.mark.parametrize("family", ["gated-some", "core", "film", "static"])
def test_gradients_reach_every_parameter(family: str, tmp_path: Path) -> None:
    model = small_model(tmp_path / "model")  # one that no engine has packed
    conditioning = random_conditioning(model, family)
    modulator = conditioning.modulator.train()
    z = torch.randn(2, 5, requires_grad=True)
    packed = PackedOptions.pack(
        [(list(b"ab"), list(b"cd")), (list(b"x"), list(b"yzw"))], torch.device("cpu")
    )
    slots = packed.per_token(torch.tensor([0, 1])).int()
    modulation = modulator.bind(modulator.rows(z), slots)
    answer_logprobs(model.decoder, packed, modulation).sum().backward()
    for name, parameter in modulator.named_parameters():
        if parameter.numel():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    if family != "static":
        assert z.grad is not None
        assert (z.grad.abs().max(1).values > 0).all()
    assert all(p.grad is None for p in model.decoder.parameters())


@pytest.mark.parametrize("family", ["gated", "core", "film", "mixed"])
def test_weakened_rows_lie_on_the_way_to_the_identity(family: str, model: LanguageModel) -> None:
    modulator = random_conditioning(model, family).modulator
    z = torch.randn(3, 5)
    with torch.no_grad():
        modulator.expand_bias += 0.3
        whole = modulator.rows(z)
        modulator.weaken(0.25)
        weak = modulator.rows(z)
    identity = modulator.layout.identity()[: modulator.layout.generated_width]
    assert torch.allclose(weak - identity, 0.25 * (whole - identity), atol=1e-5)


def test_table_slots_are_used_once_and_freed_rows_are_poisoned(model: LanguageModel) -> None:
    conditioning = random_conditioning(model, "gated")
    table = ModulationTable(conditioning.modulator.layout, 2)
    rows = [random_row(conditioning, seed) for seed in (1, 2)]
    first, second = table.add(rows[0]), table.add(rows[1])
    assert {first, second} == {1, 2}
    assert torch.equal(table.rows[second], rows[1])
    with pytest.raises(RuntimeError, match="all 2 slots"):
        table.add(rows[0])
    table.remove(first)
    assert table.rows[first].isnan().all()
    with pytest.raises(ValueError, match="not in use"):
        table.remove(first)
    with pytest.raises(ValueError, match="not in use"):
        table.remove(0)
    assert table.add(rows[0]) == first
    assert not table.rows[0].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_rows_and_latents_store_nothing(bad: float, model: LanguageModel) -> None:
    conditioning = random_conditioning(model, "gated")
    llm = LLM(model, conditioning)
    with pytest.raises(InputError, match="finite"):
        llm.users.set_latent("ana", torch.full((5,), bad))
    with pytest.raises(InputError, match=r"shape \[5\]"):
        llm.users.set_latent("ana", torch.zeros(4))
    assert "ana" not in llm.users
    huge = llm.users.set_latent("ana", torch.full((5,), 3e38)).weights  # its row is not finite
    with pytest.raises(InputError, match="finite"):
        llm.run([llm.request("Why?", huge)])
    with pytest.raises(InputError, match="shape"):
        llm.run([llm.request("Why?", UserWeights.of_row(torch.zeros(3)))])
    assert llm.engine.slots is not None
    assert llm.engine.slots.stats.filled == 0


def test_latents_come_from_choices(model: LanguageModel) -> None:
    conditioning = random_conditioning(model, "gated")
    forward = conditioning.infer(model, CHOICES)
    assert (forward - conditioning.infer(model, CHOICES[::-1])).abs().max() <= 1e-5
    swapped = [c._replace(chosen=c.rejected, rejected=c.chosen) for c in CHOICES]
    assert (forward - conditioning.infer(model, swapped)).abs().max() > 1e-3
    assert torch.equal(conditioning.infer(model, []), conditioning.encoder.prior)
    named = [choice._asdict() for choice in CHOICES]
    assert torch.equal(conditioning.infer(model, named), forward)
    for bad, message in (
        (("Why?", "a", []), "choice 1: expected at least one rejected answer"),
        (("Why?", "a", "a"), "choice 1: chosen and rejected are the same"),
        (("Why?", "a", ""), "choice 1: expected words as rejected"),
    ):
        with pytest.raises(InputError, match=message):
            conditioning.infer(model, [CHOICES[0], bad])


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_restore_every_tensor(
    family: str, model: LanguageModel, tmp_path: Path
) -> None:
    saved = random_conditioning(model, family)
    saved.notes = {"why": "test"}
    saved.save(tmp_path / "c")
    loaded = load_conditioning(tmp_path / "c", model.decoder, model.fingerprint)
    before, after = saved.tensors(), loaded.tensors()
    parameters = [*saved.encoder.state_dict().values(), *saved.modulator.state_dict().values()]
    assert len(before) == len(parameters)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.notes == saved.notes
    z = saved.infer(model, CHOICES)
    assert torch.equal(loaded.infer(model, CHOICES), z)
    assert torch.equal(loaded.row(z), saved.row(z))


def test_a_narrow_save_is_what_stays_in_memory(model: LanguageModel, tmp_path: Path) -> None:
    saved = random_conditioning(model, "gated")
    saved.save(tmp_path / "c", dtype=torch.bfloat16)
    loaded = load_conditioning(tmp_path / "c", model.decoder, model.fingerprint)
    for name, tensor in saved.tensors().items():
        assert torch.equal(tensor, loaded.tensors()[name])
        assert torch.equal(tensor, tensor.bfloat16().to(tensor.dtype))


@pytest.fixture
def checkpoint(model: LanguageModel, tmp_path: Path) -> Path:
    random_conditioning(model, "gated").save(tmp_path / "c")
    return tmp_path / "c"


def load(folder: Path, model: LanguageModel) -> Conditioning:
    return load_conditioning(folder, model.decoder, model.fingerprint)


def test_checkpoint_of_another_base(checkpoint: Path, model: LanguageModel) -> None:
    with pytest.raises(InputError, match="was made for"):
        load_conditioning(checkpoint, model.decoder, "0" * 64)


def test_missing_checkpoint(model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a folder"):
        load(tmp_path / "none", model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        load(tmp_path / "empty", model)


def test_bit_flip_and_truncation(checkpoint: Path, model: LanguageModel) -> None:
    raw = bytearray((checkpoint / WEIGHTS_FILE).read_bytes())
    raw[len(raw) // 2] ^= 1
    (checkpoint / WEIGHTS_FILE).write_bytes(raw)
    with pytest.raises(InputError, match="damaged"):
        load(checkpoint, model)
    (checkpoint / WEIGHTS_FILE).write_bytes(raw[:100])
    with pytest.raises(InputError, match="damaged"):
        load(checkpoint, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LORA"}, "LORA"),
        ({"format_version": 99}, "format_version"),
        ({"encoder": None}, "encoder|EncoderConfig"),
        (
            {"modulator": {"latent_dim": 5, "families": [{"family": "magic"}]}},
            "magic|family",
        ),
        (
            {
                "modulator": {
                    "latent_dim": 5,
                    "families": [{"family": "gated", "sites": ["x"], "rank": 2}],
                }
            },
            "sites",
        ),
        (
            {
                "modulator": {
                    "latent_dim": 5,
                    "families": [{"family": "gated", "sites": ["q"], "rank": 2}],
                }
            },
            "expected shape",
        ),
    ],
)
def test_configurations_that_do_not_fit(
    checkpoint: Path, model: LanguageModel, change: dict, message: str
) -> None:
    config = json.loads((checkpoint / CONFIG_FILE).read_text())
    (checkpoint / CONFIG_FILE).write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message):
        load(checkpoint, model)


@pytest.mark.parametrize(
    "families",
    [
        [
            {"family": "gated", "sites": ["q"], "rank": 2},
            {"family": "core", "sites": ["v"], "rank": 2},
        ],
        [
            {"family": "gated", "sites": ["q"], "rank": 2},
            {"family": "gated", "sites": ["q"], "rank": 2},
        ],
        [
            {"family": "gated", "sites": ["q"], "rank": 2},
            {"family": "gated", "sites": ["v"], "rank": 2},
        ],
        [
            {"family": "static", "sites": ["gate"], "rank": 2, "layers": [0, 1]},
            {"family": "static", "sites": ["up"], "rank": 2, "layers": [1, 2]},
        ],
        [{"family": "film"}, {"family": "film"}],
    ],
)
def test_families_that_contradict_each_other(families: list) -> None:
    with pytest.raises(ValidationError):
        ModulatorConfig.model_validate({"latent_dim": 2, "families": families})


def test_a_matrix_may_have_a_family_in_each_of_its_layers(model: LanguageModel) -> None:
    families = [
        {"family": "gated", "sites": [site], "rank": 2, "layers": [layer]}
        for layer, site in enumerate(("q", "v"))
    ]
    config = ModulatorConfig.model_validate({"latent_dim": 2, "families": families})
    sites = RowLayout(config, model.decoder.config).sites
    assert [(s.layer, s.projections) for s in sites] == [(0, ("q",)), (1, ("v",))]


@pytest.mark.parametrize(
    "family",
    [
        {"family": "film", "rank": 2},
        {"family": "gated", "sites": ["q"]},
        {"family": "gated", "rank": 2},
        {"family": "gated", "sites": ["q", "q"], "rank": 2},
    ],
)
def test_incomplete_families(family: dict) -> None:
    with pytest.raises(ValidationError):
        FamilyConfig.model_validate(family)
