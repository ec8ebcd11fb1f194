"""Users as PEFT's LoRAs and PEFT's LoRAs as users: against the `peft` package itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from fssa_runtime.cli import main
from fssa_runtime.conditioning.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Conditioning,
    load_conditioning,
)
from fssa_runtime.conditioning.choices import Choice
from fssa_runtime.errors import InputError
from fssa_runtime.integrations.lora_export import export_lora
from fssa_runtime.integrations.lora_import import as_users, read_lora, with_static
from fssa_runtime.integrations.transformers import modulate
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.models.packed import PackedOptions
from fssa_runtime.users.examples import ExampleUser, write_users

from ..conditioned import (
    CHOICES,
    FAMILIES,
    LATENT_DIM,
    random_conditioning,
    random_row,
    small_model,
)
from ..models import reference_model

TOKENS = torch.randint(0, 256, (1, 13), generator=torch.Generator().manual_seed(2))
TWO_RANKS: list[dict[str, Any]] = [
    {"family": "core", "sites": ("q", "v"), "rank": 2},
    {"family": "gated", "sites": ("gate", "up"), "rank": 3},
    {"family": "static", "sites": ("down",), "rank": 5},
]


@pytest.fixture(autouse=True)
def _two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "two-ranks", TWO_RANKS)


def logits_of_rows(
    model: LanguageModel, conditioning: Conditioning, rows: list[torch.Tensor]
) -> torch.Tensor:
    """``[U, S, V]`` of our decoder for the same tokens, a user in each sequence of the batch."""
    tokens = TOKENS[0].tolist()
    packed = PackedOptions.pack([(tokens[:-1], tokens[-1:])] * len(rows), torch.device("cpu"))
    table = torch.stack([conditioning.modulator.layout.identity(), *rows])
    slots = packed.per_token(torch.arange(len(rows)) + 1).int()
    with torch.no_grad():
        hidden = packed.hidden(model.decoder, conditioning.modulator.bind(table, slots))
        return model.decoder.logits(hidden).view(len(rows), len(tokens), -1)


def peft_logits(model: LanguageModel, folder: Path) -> torch.Tensor:
    """``[S, V]`` of the base with an adapter that PEFT itself loads."""
    loaded = peft.PeftModel.from_pretrained(reference_model(model.folder), str(folder)).eval()
    with torch.no_grad():
        return loaded(input_ids=TOKENS).logits[0]


def write_adapter(model: LanguageModel, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """An adapter that PEFT makes and saves, its matrices random."""
    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **settings}
    wrapped = peft.get_peft_model(reference_model(model.folder), peft.LoraConfig(**given))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    wrapped.save_pretrained(folder)
    return folder


def base_of(model: LanguageModel) -> dict[str, str]:
    return {"base_model": model.name, "base_fingerprint": model.fingerprint}


@pytest.mark.parametrize(
    "family", ["gated", "gated-some", "core", "static", "factors", "two-ranks"]
)
def test_peft_gives_what_the_user_gets(family: str, model: LanguageModel, tmp_path: Path) -> None:
    conditioning = random_conditioning(model, family)
    rows = [random_row(conditioning, seed) for seed in (1, 2)]
    ours = logits_of_rows(model, conditioning, rows)
    for index, row in enumerate(rows):
        export_lora(conditioning, row, tmp_path / str(index))
        assert (peft_logits(model, tmp_path / str(index)) - ours[index]).abs().max() <= 1e-4
    with torch.no_grad():
        base = reference_model(model.folder)(TOKENS).logits[0]
    assert (ours - base).abs().amax((1, 2)).min() > 1e-2
    if family != "static":
        assert (ours[0] - ours[1]).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["film", "authors", "mixed"])
def test_film_is_refused_with_the_reason(family: str, model: LanguageModel, tmp_path: Path) -> None:
    conditioning = random_conditioning(model, family)
    with pytest.raises(InputError, match=r"film.*full rank"):
        export_lora(conditioning, random_row(conditioning, 1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_that_are_none(model: LanguageModel, tmp_path: Path) -> None:
    conditioning = random_conditioning(model, "gated")
    for row in (torch.zeros(3), conditioning.modulator.layout.identity() * float("nan")):
        with pytest.raises(InputError, match="finite numbers"):
            export_lora(conditioning, row, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_and_import_agree(model: LanguageModel, tmp_path: Path) -> None:
    conditioning = random_conditioning(model, "two-ranks")
    row = random_row(conditioning, 3)
    export_lora(conditioning, row, tmp_path / "user")
    adapter = read_lora(tmp_path / "user", model.decoder.config)
    everybody, users = as_users({"ana": adapter}, model.decoder.config, **base_of(model))
    ours = logits_of_rows(model, conditioning, [row])
    again = logits_of_rows(model, everybody, [users["ana"].make_row()])
    assert (ours - again).abs().max() <= 1e-4


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 2, r"layers\.1\.self_attn\.q_proj": 6},
        "alpha_pattern": {"up_proj": 9},
    },
    "rslora": {"use_rslora": True},
    "some-layers": {"layers_to_transform": [0, 2]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_adapters_become_static(name: str, model: LanguageModel, tmp_path: Path) -> None:
    folder = write_adapter(model, tmp_path / "lora", **SETTINGS[name])
    adapter = read_lora(folder, model.decoder.config)
    conditioning = with_static(adapter, model.decoder.config, **base_of(model))
    conditioning.save(tmp_path / "c")
    loaded = load_conditioning(tmp_path / "c", model.decoder, model.fingerprint)
    ours = logits_of_rows(model, loaded, [loaded.row(torch.zeros(1)), loaded.row(torch.ones(1))])
    theirs = peft_logits(model, folder)
    assert (ours - theirs).abs().max() <= 1e-4  # whoever they are


def test_a_batch_of_adapters(model: LanguageModel, tmp_path: Path) -> None:
    """Different ranks, linears and layers, one batch: each row is what PEFT computes alone."""
    folders = {
        name: write_adapter(model, tmp_path / name, seed, **SETTINGS[name])
        for seed, name in enumerate(SETTINGS)
    }
    adapters = {n: read_lora(folder, model.decoder.config) for n, folder in folders.items()}
    conditioning, users = as_users(adapters, model.decoder.config, **base_of(model))
    ours = logits_of_rows(model, conditioning, [user.make_row() for user in users.values()])
    for index, folder in enumerate(folders.values()):
        assert (ours[index] - peft_logits(model, folder)).abs().max() <= 1e-4
    assert len({user.fingerprint for user in users.values()}) == len(users)
    reference = reference_model(model.folder)
    with torch.no_grad(), modulate(reference, conditioning).users(list(users.values())):
        in_transformers = reference(TOKENS.expand(len(users), -1)).logits
    assert (in_transformers - ours).abs().max() <= 1e-4


def test_an_adapter_beside_a_conditioning(model: LanguageModel, tmp_path: Path) -> None:
    """Users keep their own; the LoRA is everybody's."""
    beside = random_conditioning(model, "two-ranks")
    folder = write_adapter(model, tmp_path / "lora", target_modules=["o_proj"])
    adapter = read_lora(folder, model.decoder.config)
    both = with_static(adapter, model.decoder.config, **base_of(model), beside=beside)
    z = torch.randn(LATENT_DIM)
    assert torch.equal(both.row(z), beside.row(z))
    assert torch.equal(both.infer(model, CHOICES), beside.infer(model, CHOICES))
    export_lora(beside, beside.row(z), tmp_path / "user")
    plain = peft.PeftModel.from_pretrained(reference_model(model.folder), str(tmp_path / "user"))
    plain = peft.PeftModel.from_pretrained(plain.merge_and_unload(), str(folder)).eval()
    with torch.no_grad():
        expected = plain(input_ids=TOKENS).logits[0]
    ours = logits_of_rows(model, both, [both.row(z)])[0]
    assert (ours - expected).abs().max() <= 1e-4
    clash = read_lora(write_adapter(model, tmp_path / "qv"), model.decoder.config)
    with pytest.raises(InputError, match="cannot stand beside"):
        with_static(clash, model.decoder.config, **base_of(model), beside=beside)


def test_two_adapters_of_one_matrix_do_not_replace_each_other(
    model: LanguageModel, tmp_path: Path
) -> None:
    ana, ben = (
        read_lora(
            write_adapter(model, tmp_path / module, target_modules=[module]), model.decoder.config
        )
        for module in ("q_proj", "v_proj")
    )
    beside = with_static(ana, model.decoder.config, **base_of(model))
    with pytest.raises(InputError, match=r"beside.*\n.*name q, v in one family"):
        with_static(ben, model.decoder.config, **base_of(model), beside=beside)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'LORA', got 'IA3'"),
        ({"use_dora": True}, "use_dora = True: expected a plain LoRA"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"a_field_of_tomorrow": 1}, "a_field_of_tomorrow"),
        ({"r": 3}, r"expected A and B of shapes \[3, 48\] and \[48, 3\], got \[4, 48\]"),
        ({"r": None}, "r of .*q_proj: expected a positive integer, got None"),
        ({"lora_alpha": "six"}, "lora_alpha of .*: expected a number, got 'six'"),
        ({"alpha_pattern": {"(": 2}}, "is no pattern"),
    ],
)
def test_configurations_that_are_refused(
    change: dict, message: str, model: LanguageModel, tmp_path: Path
) -> None:
    folder = write_adapter(model, tmp_path / "lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message):
        read_lora(folder, model.decoder.config)


NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (NAME, None, r"layers\.1\.self_attn\.q_proj: lora_A is missing"),
        (NAME, torch.full((4, 48), float("inf")), "NaN or infinity"),
        (NAME, torch.zeros(4, 47), r"got \[4, 47\]"),
        (NAME, torch.zeros(4, 48, dtype=torch.int64), "expected a matrix"),
        (NAME.replace("layers.1", "layers.3"), torch.zeros(4, 48), "in one of 3 layers"),
        ("base_model.model.lm_head.lora_A.weight", torch.zeros(4, 48), "expected lora_A or lora_B"),
        (
            NAME.replace("lora_A.weight", "lora_magnitude_vector"),
            torch.zeros(48),
            "expected lora_A",
        ),
        (NAME.replace("self_attn", "other"), torch.zeros(4, 48), "second adapter"),
    ],
)
def test_tensors_that_do_not_fit(
    name: str, tensor: torch.Tensor | None, message: str, model: LanguageModel, tmp_path: Path
) -> None:
    folder = write_adapter(model, tmp_path / "lora")
    tensors = load_file(folder / "adapter_model.safetensors")
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=message):
        read_lora(folder, model.decoder.config)


def test_files_that_are_missing_or_damaged(model: LanguageModel, tmp_path: Path) -> None:
    shape = model.decoder.config
    with pytest.raises(InputError, match=r"adapter_config\.json: No such file"):
        read_lora(tmp_path, shape)
    folder = write_adapter(model, tmp_path / "lora")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="not a readable safetensors"):
        read_lora(folder, shape)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"No such file.*only safetensors are read"):
        read_lora(folder, shape)
    save_file({}, weights)
    with pytest.raises(InputError, match="got none"):
        read_lora(folder, shape)
    other = small_model(tmp_path / "other", "mistral-full")
    fresh = write_adapter(model, tmp_path / "fresh")
    with pytest.raises(InputError, match=r"\[64, 4\], got"):
        read_lora(fresh, other.decoder.config)
    with pytest.raises(InputError, match="at least one"):
        as_users({}, shape, **base_of(model))


def test_the_commands(
    model: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user out of a checkpoint, and that LoRA in again: everybody is that user then."""
    conditioning = random_conditioning(model, "gated")
    conditioning.save(tmp_path / "c")
    write_users([ExampleUser("ana", CHOICES)], tmp_path / "c" / "example_users.json")
    base, adapter, back = ["--model", str(model.folder)], tmp_path / "[ana]", tmp_path / "[back]"
    export = ["export-lora", *base, "--conditioning", str(tmp_path / "c"), "--output", str(adapter)]
    assert main([*export, "--user", "bob"]) == 1
    assert "'bob' is not known: expected one of ana" in capsys.readouterr().err
    assert not adapter.exists()
    nothing = ExampleUser("ana", (Choice("Why?", "Because.", []),))
    write_users([nothing], tmp_path / "nothing.json")
    bad = ["--user", "ana", "--users-file", str(tmp_path / "nothing.json")]
    assert main([*export, *bad]) == 1
    assert "choice 0: expected at least one rejected answer" in capsys.readouterr().err
    assert not adapter.exists()
    assert main([*export, "--user", "ana"]) == 0
    assert capsys.readouterr().out.endswith(f": {adapter}\n")
    row = conditioning.row(conditioning.infer(model, CHOICES))
    ours = logits_of_rows(model, conditioning, [row])[0]
    assert (peft_logits(model, adapter) - ours).abs().max() <= 1e-4
    assert main(["import-lora", str(adapter), *base, "--output", str(back)]) == 0
    assert capsys.readouterr().out.endswith(f": {back}\n")
    loaded = load_conditioning(back, model.decoder, model.fingerprint)
    again = logits_of_rows(model, loaded, [loaded.row(torch.zeros(1))])[0]
    assert (again - ours).abs().max() <= 1e-4
    extend = ["--conditioning", str(tmp_path / "c"), "--output", str(tmp_path / "both")]
    assert main(["import-lora", str(adapter), *base, *extend]) == 1
    assert "cannot stand beside" in capsys.readouterr().err
    assert main(["export-lora", "--user", "x", *base, "--output", str(tmp_path / "no")]) == 1
    assert "expected --conditioning" in capsys.readouterr().err


def test_the_commands_overwrite_nothing_unasked(
    model: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A conditioning's folder and a LoRA's look alike; what a command reads it never replaces."""
    conditioning = tmp_path / "c"
    random_conditioning(model, "gated").save(conditioning)
    write_users([ExampleUser("ana", CHOICES)], conditioning / "example_users.json")
    lora = write_adapter(model, tmp_path / "lora", target_modules=["k_proj"])
    base = ["--model", str(model.folder), "--conditioning", str(conditioning)]
    export, again = ["export-lora", "--user", "ana", *base], ["import-lora", str(lora), *base]

    def contents() -> list[bytes]:
        names = (CONFIG_FILE, WEIGHTS_FILE)
        return [(folder / n).read_bytes() for folder in (conditioning, lora) for n in names]

    before = contents()
    for command, output in ((export, lora), (again, conditioning)):
        assert main([*command, "--output", str(output)]) == 1
        assert f"--output {output}" in capsys.readouterr().err
    for command, output in ((export, conditioning), (again, conditioning), (again, lora)):
        assert main([*command, "--output", str(output), "--overwrite"]) == 1
        assert "expected another folder than one that is read" in capsys.readouterr().err
    assert contents() == before
    assert main([*export, "--output", str(lora), "--overwrite"]) == 0
    assert contents()[:2] == before[:2]
    assert read_lora(lora, model.decoder.config)
    assert contents()[2:] != before[2:]
