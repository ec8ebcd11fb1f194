"""Checkpoints of the paper's code, equal to plain PyTorch on the same tensors once translated.

The tensors get their names from a tree of modules that is put together as theirs is, around
PEFT's own LoRA.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from torch import nn

from fssa_runtime.cli import main
from fssa_runtime.conditioning.checkpoint import Conditioning, load_conditioning
from fssa_runtime.conditioning.choices import Choice
from fssa_runtime.conditioning.encoder import EncoderConfig, PreferenceEncoder
from fssa_runtime.errors import InputError
from fssa_runtime.integrations.authors import import_authors
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.models.packed import PackedOptions

from ..conditioned import small_model
from ..models import reference_model

E, HIDDEN, RANK = 12, 16, 3
CONFIG: dict[str, Any] = {
    "model_type": "policy",
    "device": "cuda:0",
    "input_dim": E,
    "hidden_dim": HIDDEN,
    "llm_name": "nobody/knows-this",
    "tune_llm": True,
    "lora_alpha": 7,
    "lora_dropout": 0.1,
    "lora_r": RANK,
    "num_film_layers": -1,
    "is_conditional": True,
    "sample_latents": False,
    "context_agg_func": "self-attention",
    "context_input_encoder": "linear",
}
DATA = {"path_to_context_data": "/data/embedded_pairs_1024/some/Embedder", "max_num_context": 6}


def two_layers(inputs: int, outputs: int) -> nn.Module:
    net = nn.Module()
    net.net = nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs))
    net.forward = net.net.forward  # type: ignore[method-assign]
    return net


class Encoder(nn.Module):
    """Choices to a latent, with torch's own attention; no masks, no padding."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.kind, self.stochastic = config["context_agg_func"], config["sample_latents"]
        linear = config["context_input_encoder"] == "linear"
        self.inner_encoder = nn.Linear(2 * E, HIDDEN) if linear else two_layers(2 * E, HIDDEN)
        if self.kind == "self-attention":
            self.self_attention = nn.MultiheadAttention(HIDDEN, 8, 0.1, batch_first=True)
        self.outer_encoder = two_layers(HIDDEN, HIDDEN * (2 if self.stochastic else 1))

    def forward(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        encoded = self.inner_encoder(torch.cat([chosen, rejected], -1))[None]
        if self.kind == "self-attention":
            encoded = self.self_attention(encoded, encoded, encoded)[0]
        pooled = encoded.mean(1) if self.kind == "mean" else encoded.sum(1)
        return self.outer_encoder(pooled)[0]


class Filmed(nn.Module):
    """A block whose output is modulated by the latent that lies in ``shared``."""

    def __init__(self, block: nn.Module, width: int, shared: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.block, self.shared = block, shared
        self.film = nn.Module()
        for part in ("gamma_mlp", "beta_mlp"):
            mlp = nn.Module()
            mlp.net = nn.Sequential(nn.Linear(HIDDEN, width))
            setattr(self.film, part, mlp)

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        out, z = self.block(hidden, **arguments), self.shared["z"]
        return self.film.gamma_mlp.net(z) * out + self.film.beta_mlp.net(z)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)


class Policy(nn.Module):
    """Encoder, policy and reference, nested and named as in the paper's code."""

    def __init__(self, base: Any, reference: Any, config: dict[str, Any]) -> None:
        super().__init__()
        self.shared: dict[str, torch.Tensor] = {}
        self.model = nn.Module()
        self.model.context_encoder = Encoder(config)
        self.model.decoder = nn.Module()
        self.model.decoder.conditional_llm = self._language_model(base, config)
        self.model.decoder.reference_model = self._language_model(reference, config)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "reference_model" in name:
                    if "lora_B" in name:
                        parameter.zero_()
                elif "lora_" in name or "film" in name or "context_encoder" in name:
                    parameter.normal_(std=0.3)
                    if "gamma_mlp" in name and name.endswith("bias"):
                        parameter.add_(1.0)

    def _language_model(self, base: Any, config: dict[str, Any]) -> nn.Module:
        wrapped, layers = base, base.model.layers
        if config["tune_llm"]:
            lora = peft.LoraConfig(
                r=config["lora_r"],
                lora_alpha=config["lora_alpha"],
                lora_dropout=0.1,
                target_modules=["q_proj", "v_proj"],
            )
            wrapped = peft.LoraModel(base, lora, "default")
        given = config["num_film_layers"]
        indices = given if isinstance(given, list) else range(len(layers) if given < 0 else given)
        for index in indices:
            layers[index] = Filmed(layers[index], base.config.hidden_size, self.shared)
        owner = nn.Module()
        owner.base = wrapped
        return owner

    def logits(self, z: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        self.shared["z"] = z
        return self.model.decoder.conditional_llm.base(input_ids=tokens).logits

    def trained(self) -> dict[str, torch.Tensor]:
        """What their trainer saves: parameters with one of three words in their names."""
        words = ("lora_", "film", "context_encoder")
        return {n: p for n, p in self.named_parameters() if any(word in n for word in words)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small_model(tmp_path_factory.mktemp("base") / "model", "qwen2")


def write(folder: Path, tensors: dict, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    record = {"model": config, "loss": {"beta_dpo": 0.05}, "data": DATA}
    (folder / "config.yaml").write_text(yaml.safe_dump(record))
    torch.save(tensors, folder / "model_best.pt")
    return folder


def make(model: LanguageModel, folder: Path, **changes: Any) -> tuple[Policy, dict[str, Any]]:
    torch.manual_seed(0)
    config = {**CONFIG, **changes}
    policy = Policy(reference_model(model.folder), reference_model(model.folder), config).eval()
    write(folder, policy.trained(), config)
    return policy, config


def read(model: LanguageModel, folder: Path) -> Conditioning:
    return import_authors(
        folder, model.decoder.config, base_model=model.name, base_fingerprint=model.fingerprint
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"context_agg_func": "mean", "context_input_encoder": "mlp"},
        {"context_agg_func": "sum", "sample_latents": True, "num_z_samples_eval": 4},
        {"num_film_layers": 2},
        {"num_film_layers": [0, -1], "tune_llm": False},
    ],
)
def test_latents_and_logits_equal_plain_pytorch(
    changes: dict, model: LanguageModel, tmp_path: Path
) -> None:
    policy, config = make(model, tmp_path / "theirs", **changes)
    read(model, tmp_path / "theirs").save(tmp_path / "ours")
    ours = load_conditioning(tmp_path / "ours", model.decoder, model.fingerprint)
    tokens = torch.randint(0, 256, (2, 9))
    packed = PackedOptions.pack(
        [(list(row[:-1]), [row[-1]]) for row in tokens.tolist()], torch.device("cpu")
    )
    layout = ours.modulator.layout
    rows, wanted = [layout.identity()], []
    with torch.no_grad():
        for n in (1, 4):
            chosen, rejected = torch.randn(2, n, E)
            expected = policy.model.context_encoder(chosen, rejected)
            mask = torch.ones(1, n, dtype=torch.bool)
            latent = ours.encoder(chosen[None], rejected[None], mask)
            mean = expected[:HIDDEN]
            assert (ours.infer_embedded(chosen, rejected) - mean).abs().max() <= 1e-4
            if config["sample_latents"]:
                std = nn.functional.softplus(expected[HIDDEN:])
                assert (latent.log_std.exp()[0] - std).abs().max() <= 1e-4
            rows.append(ours.row(mean))
            wanted.append(policy.logits(mean, tokens[len(wanted) : len(wanted) + 1])[0])
        slots = packed.per_token(torch.tensor([1, 2])).int()
        modulation = ours.modulator.bind(torch.stack(rows), slots)
        got = model.decoder.logits(packed.hidden(model.decoder, modulation)).view(2, 9, -1)
        base = model.decoder.logits(packed.hidden(model.decoder)).view(2, 9, -1)
    scale = torch.stack(wanted).abs().max()
    assert (got - torch.stack(wanted)).abs().max() <= 1e-4 * scale.clamp(min=1)
    assert (got - base).abs().max() > 1.0
    assert layout.width == 2 * 48 * 3


@pytest.mark.parametrize("aggregate", ["self-attention", "sum"])
def test_no_choices_are_their_empty_sum(
    aggregate: str, model: LanguageModel, tmp_path: Path
) -> None:
    policy, _ = make(model, tmp_path / "theirs", context_agg_func=aggregate)
    ours = read(model, tmp_path / "theirs")
    with torch.no_grad():
        theirs = policy.model.context_encoder.outer_encoder(torch.zeros(HIDDEN))
    assert (ours.infer(model, []) - theirs).abs().max() <= 1e-5
    assert theirs.abs().max() > 0.1


def test_text_is_refused_and_names_the_embedder(model: LanguageModel, tmp_path: Path) -> None:
    make(model, tmp_path / "theirs")
    ours = read(model, tmp_path / "theirs")
    with pytest.raises(InputError, match=r"made by 'some/Embedder'.*infer_embedded"):
        ours.infer(model, [Choice("Why?", "So.", "Because.")])
    with pytest.raises(InputError, match=r"chosen: expected \[2, 12\], got \[2, 3\]"):
        ours.infer_embedded(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"rejected: expected \[2, 12\], got \[1, 12\]"):
        ours.infer_embedded(torch.zeros(2, E), torch.zeros(1, E))
    with pytest.raises(InputError, match="rejected: expected finite"):
        ours.infer_embedded(torch.zeros(1, E), torch.full((1, E), float("inf")))


def test_narrow_tensors_without_the_reference(model: LanguageModel, tmp_path: Path) -> None:
    policy, config = make(model, tmp_path / "theirs")
    whole = read(model, tmp_path / "theirs")
    own = {n: t.half() for n, t in policy.trained().items() if "reference_model" not in n}
    write(tmp_path / "theirs", own, config)
    narrow = read(model, tmp_path / "theirs")
    for name, tensor in whole.tensors().items():
        difference = (tensor - narrow.tensors()[name]).abs()
        assert (difference <= 4e-3 * tensor.abs().clamp(min=1)).all(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "reward"}, r"model\.model_type.*policy"),
        ({"is_conditional": False}, r"model\.is_conditional"),
        ({"context_agg_func": "max"}, r"model\.context_agg_func"),
        ({"context_input_encoder": "gpt2"}, r"model\.context_input_encoder"),
        ({"hidden_dim": 12}, "multiple of 8"),
        ({"num_film_layers": 4}, r"num_film_layers.*3 there are, got 4"),
        ({"num_film_layers": 0}, "num_film_layers"),
        ({"num_film_layers": [3]}, "num_film_layers"),
        ({"use_dora": True}, r"model\.use_dora: Extra"),
        ({"lora_r": None}, r"model\.lora_r"),
        ({"lora_r": 2}, r"lora_A.*expected shape \[2, 48\], got \[3, 48\]"),
        ({"input_dim": 24}, r"inner_encoder\.weight: expected shape \[16, 48\]"),
        ({"context_agg_func": "sum"}, r"unexpected: .*self_attention"),
        ({"context_input_encoder": "mlp"}, r"unexpected: .*inner_encoder"),
        ({"tune_llm": False}, "unexpected: "),
        ({"num_film_layers": 1}, "unexpected: "),
    ],
)
def test_configurations_that_do_not_fit(
    change: dict, message: str, model: LanguageModel, tmp_path: Path
) -> None:
    policy, config = make(model, tmp_path / "theirs")
    write(tmp_path / "theirs", policy.trained(), {**config, **change})
    with pytest.raises(InputError, match=message):
        read(model, tmp_path / "theirs")


def without(tensors: dict, word: str) -> dict:
    return {name: tensor for name, tensor in tensors.items() if word not in name}


FIRST_B = "model.decoder.{}.base.model.model.layers.0.block.self_attn.q_proj.lora_B.default.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, "context_encoder"), r"missing: model\.context_encoder.* and 7 more"),
        (lambda t: without(t, "conditional_llm.base.model.model.layers.1.film"), "missing: "),
        (lambda t: without(t, "reference_model.base.model.model.layers.1"), "missing: .*reference"),
        (lambda t: {**t, "model.extra": torch.zeros(1)}, r"unexpected: model\.extra;"),
        (lambda t: {**t, FIRST_B.format("conditional_llm"): 3}, "expected a tensor"),
        (
            lambda t: {**t, FIRST_B.format("conditional_llm"): torch.zeros(48, 3).to_sparse()},
            "expected a tensor",
        ),
        (
            lambda t: {**t, FIRST_B.format("conditional_llm"): torch.full((48, 3), float("nan"))},
            "NaN or infinity",
        ),
        (
            lambda t: {**t, FIRST_B.format("reference_model"): torch.ones(48, 3)},
            "a reference that is the base",
        ),
        (lambda t: list(t.values()), "expected tensors by name, got list"),
        (lambda t: {**t, "model.extra": torch.zeros(1000, 1000)}, "holds .* bytes; .* at most"),
    ],
)
def test_tensors_that_do_not_fit(
    change: Any, message: str, model: LanguageModel, tmp_path: Path
) -> None:
    policy, config = make(model, tmp_path / "theirs")
    write(tmp_path / "theirs", change(policy.trained()), config)
    with pytest.raises(InputError, match=message):
        read(model, tmp_path / "theirs")


class Malicious:
    """Runs code if it is unpickled."""

    def __reduce__(self) -> Any:
        return (open, ("was-here", "w"))


def test_nothing_is_run(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, config = make(model, tmp_path / "theirs")
    write(tmp_path / "theirs", {**policy.trained(), "x": Malicious()}, config)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="cannot be read as tensors alone"):
        read(model, tmp_path / "theirs")
    assert not (tmp_path / "was-here").exists()


def test_damaged_and_missing_files(model: LanguageModel, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    with pytest.raises(InputError, match=r"config\.yaml: No such file"):
        read(model, folder)
    make(model, folder)
    weights = folder / "model_best.pt"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"an archive of torch\.save"):
        read(model, folder)
    with zipfile.ZipFile(weights, "w") as archive:
        archive.writestr("other.txt", "no tensors")
    with pytest.raises(InputError, match="cannot be read as tensors"):
        read(model, folder)
    weights.unlink()
    with pytest.raises(InputError, match=r"model_best\.pt: No such file"):
        read(model, folder)
    (folder / "config.yaml").write_text("model: [")
    with pytest.raises(InputError, match="not YAML"):
        read(model, folder)
    (folder / "config.yaml").write_text("loss: {}")
    with pytest.raises(InputError, match="section 'model'"):
        read(model, folder)


def test_the_command(
    model: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(model, tmp_path / "theirs")
    output = tmp_path / "ours"
    arguments = ["import-authors", str(tmp_path / "theirs"), "--output", str(output)]
    assert main([*arguments, "--model", str(model.folder)]) == 0
    assert "film, static" in capsys.readouterr().out
    saved = load_conditioning(output, model.decoder, model.fingerprint).tensors()
    for name, tensor in read(model, tmp_path / "theirs").tensors().items():
        assert torch.equal(saved[name], tensor)
    assert main([*arguments, "--model", str(model.folder)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--model", str(tmp_path / "none"), "--overwrite"]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_an_encoder_of_a_single_linear_map() -> None:
    """h1 without a hidden layer: the sum of choices is then linear in the options."""
    encoder = PreferenceEncoder(
        EncoderConfig(
            option_dim=4, latent_dim=3, hidden_dim=5, aggregate="sum", pair_encoder="linear"
        )
    )
    chosen, rejected = torch.randn(2, 1, 2, 4)
    mask = torch.ones(1, 2, dtype=torch.bool)
    with torch.no_grad():
        expected = encoder.h2(encoder.h1(torch.cat([chosen, rejected], -1)).sum(1))
        assert torch.allclose(encoder(chosen, rejected, mask).mean, expected, atol=1e-6)
        doubled = encoder.summarise(2 * chosen, 2 * rejected, mask).total
        bias = 2 * encoder.h1.bias
        once = encoder.summarise(chosen, rejected, mask).total
    assert torch.allclose(doubled - bias, 2 * (once - bias), atol=1e-5)
