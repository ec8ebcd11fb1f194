"""Checkpoints of the code that goes with arXiv 2412.13998, as conditionings of ours.

Theirs is a folder with ``config.yaml`` and ``model_best.pt``, a dictionary of the trained tensors
of an NP-DPO policy by the names of their modules (their code of July 2025):

    model.context_encoder.*                       choices → z
    model.decoder.conditional_llm.base.*.lora_*   a LoRA on q and v, the same for everybody
    model.decoder.conditional_llm.base.*.film.*   γ = W z + b and β = W z + b of a block's output

which is ``static`` and ``film`` here. A copy under ``reference_model``, which their code saves
along, is DPO's reference: the base. What differs and stays exact: their mean does not tell the
second encoder layer how many choices there were (its weight for that is zero here), and without
choices their sum over nothing gives h2(0), which becomes the prior. Their mean of no choices is not
a number; it too becomes h2(0).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn
from typing_extensions import Self

from ..conditioning.checkpoint import Conditioning
from ..conditioning.embedding import EmbeddingConfig
from ..conditioning.encoder import Aggregate, EncoderConfig, PreferenceEncoder
from ..conditioning.layout import BaseShape, FamilyConfig, LinearName, ModulatorConfig
from ..conditioning.modulator import Modulator
from ..errors import InputError
from .modules import LEAVES, ModelShape

CONFIG_FILE = "config.yaml"
WEIGHTS_FILE = "model_best.pt"
_LORA_SITES: tuple[LinearName, ...] = ("q", "v")
_AGGREGATES: dict[str, Aggregate] = {"self-attention": "attention", "mean": "mean", "sum": "sum"}
_NUM_HEADS = 8  # written into their encoder
_ENCODER = "model.context_encoder."
_POLICY = "model.decoder.conditional_llm."
_REFERENCE = "model.decoder.reference_model."
# No number of theirs is wider than 8 bytes; names and the archive's own tables come on top.
_BYTES_A_NUMBER, _BYTES_A_TENSOR = 8, 2048


class AuthorsConfig(BaseModel):
    """The ``model`` section of their ``config.yaml``, for a policy that depends on the user."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_type: Literal["policy"]
    is_conditional: Literal[True]
    device: str = "cpu"
    llm_name: str
    input_dim: int = Field(ge=1)
    hidden_dim: int = Field(ge=1)
    tune_llm: bool
    lora_r: int = Field(ge=1)
    lora_alpha: float = Field(allow_inf_nan=False)
    lora_dropout: float = 0.0
    num_film_layers: int | tuple[int, ...]
    sample_latents: bool
    num_z_samples_train: int | None = None
    num_z_samples_eval: int | None = None
    context_agg_func: Literal["self-attention", "mean", "sum"]
    context_input_encoder: Literal["linear", "mlp"]

    @model_validator(mode="after")
    def _heads_divide_hidden(self) -> Self:
        if self.context_agg_func == "self-attention" and self.hidden_dim % _NUM_HEADS:
            raise ValueError(f"hidden_dim: expected a multiple of {_NUM_HEADS} for self-attention")
        return self

    def film_layers(self, num_layers: int) -> list[int]:
        """Blocks that end in FiLM, in their words: -1 is all, a number the first so many."""
        given = self.num_film_layers
        if isinstance(given, int):
            given = tuple(range(num_layers if given == -1 else given))
        if not given or not all(-num_layers <= layer < num_layers for layer in given):
            raise InputError(
                f"num_film_layers: expected -1, or layers of the {num_layers} there are, "
                f"got {self.num_film_layers}"
            )
        return sorted({layer % num_layers for layer in given})


def read_config(folder: Path) -> tuple[AuthorsConfig, dict[str, Any]]:
    """The model's section of ``config.yaml``, and everything else in the file.

    Raises:
        InputError: no such file, not YAML, or a model that is no conditional policy, has an option
            this import does not know, or lacks one.
    """
    path = folder / CONFIG_FILE
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("model"), dict):
        raise InputError(f"{path}: expected a section 'model'")
    try:
        config = AuthorsConfig.model_validate(record["model"])
    except ValidationError as error:
        problems = "; ".join(
            f"model.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()
        )
        raise InputError(f"{path}: {problems}") from error
    return config, {key: value for key, value in record.items() if key != "model"}


def import_authors(
    folder: Path, shape: BaseShape, *, base_model: str, base_fingerprint: str
) -> Conditioning:
    """Read both files for a base of this shape; ``model_best.pt`` with ``weights_only=True``.

    Choices come to this encoder as vectors (`Conditioning.infer_embedded`): it reads hidden states
    of another, larger model.

    Raises:
        InputError: as `read_config` does; a file too large for these sizes, damaged, or holding
            anything but tensors; a tensor missing, unexpected, of the wrong shape or not finite.
    """
    config, others = read_config(folder)
    path = folder / WEIGHTS_FILE
    layers = config.film_layers(shape.num_layers)
    expected = _expected(config, shape, layers)
    tensors = _read(path, expected)
    data = others.get("data")
    source = data.get("path_to_context_data", "") if isinstance(data, dict) else ""
    embedder = "/".join(Path(str(source)).parts[-2:])  # their folders end in owner/name
    notes = {"authors_model": config.model_dump(mode="json")}
    return Conditioning(
        _encoder(config, tensors).eval(),
        _modulator(config, shape, layers, tensors).eval(),
        EmbeddingConfig(pooling="last", model=embedder or "the embedder it was trained with"),
        base_model,
        base_fingerprint,
        notes,
    )


def _expected(
    config: AuthorsConfig, shape: BaseShape, film_layers: list[int]
) -> dict[str, list[int]]:
    """Names and shapes of all tensors, but for the reference's copy."""
    hidden, wide = config.hidden_dim, config.hidden_dim * (2 if config.sample_latents else 1)
    pair = 2 * config.input_dim

    def linear(name: str, out_features: int, in_features: int) -> dict[str, list[int]]:
        return {f"{name}.weight": [out_features, in_features], f"{name}.bias": [out_features]}

    encoder = {}
    if config.context_input_encoder == "linear":
        encoder.update(linear("inner_encoder", hidden, pair))
    else:
        encoder.update(linear("inner_encoder.net.0", hidden, pair))
        encoder.update(linear("inner_encoder.net.2", hidden, hidden))
    if config.context_agg_func == "self-attention":
        encoder["self_attention.in_proj_weight"] = [3 * hidden, hidden]
        encoder["self_attention.in_proj_bias"] = [3 * hidden]
        encoder.update(linear("self_attention.out_proj", hidden, hidden))
    encoder.update(linear("outer_encoder.net.0", hidden, hidden))
    encoder.update(linear("outer_encoder.net.2", wide, hidden))
    expected = {_ENCODER + name: size for name, size in encoder.items()}
    features = ModelShape(
        shape.num_layers, shape.hidden_size, shape.qkv_splits, shape.gate_up_splits
    ).features
    for layer in range(shape.num_layers):
        for site in _LORA_SITES if config.tune_llm else ():
            path = _lora_path(config, film_layers, layer, site)
            rows, columns = features(site)
            expected[f"{_POLICY}{path}.lora_A.default.weight"] = [config.lora_r, columns]
            expected[f"{_POLICY}{path}.lora_B.default.weight"] = [rows, config.lora_r]
    for layer in film_layers:
        for part in ("gamma", "beta"):
            name = _POLICY + _film_path(config, layer, part)
            expected.update(linear(name, shape.hidden_size, hidden))
    return expected


def _layer_path(config: AuthorsConfig, layer: int) -> str:
    # With a LoRA the base lies in PEFT's wrapper, one level deeper.
    return f"base.{'model.model' if config.tune_llm else 'model'}.layers.{layer}"


def _lora_path(config: AuthorsConfig, film_layers: list[int], layer: int, site: LinearName) -> str:
    block = ".block" if layer in film_layers else ""
    return f"{_layer_path(config, layer)}{block}.self_attn.{LEAVES[site]}"


def _film_path(config: AuthorsConfig, layer: int, part: str) -> str:
    return f"{_layer_path(config, layer)}.film.{part}_mlp.net.0"


def _read(path: Path, expected: Mapping[str, list[int]]) -> dict[str, torch.Tensor]:
    """The tensors of a file, as float32, without the reference's copy; checked."""
    reference = {
        _REFERENCE + name.removeprefix(_POLICY): size
        for name, size in expected.items()
        if name.startswith(_POLICY)
    }
    known = {**expected, **reference}
    numbers = sum(torch.Size(size).numel() for size in known.values())
    _check_size(path, _BYTES_A_NUMBER * numbers + _BYTES_A_TENSOR * (len(known) + 1))
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what malformed pickles raise shares no base class
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} cannot be read as tensors alone: {first_line}") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: expected tensors by name, got {type(loaded).__name__}")
    extra = sorted(str(name) for name in loaded.keys() - known.keys())
    if extra:
        raise InputError(
            f"{path}: unexpected: {_several(extra)}; expected what {CONFIG_FILE} asks for, in the "
            "layout of the authors' code of July 2025"
        )
    # Their reference is saved whole or not at all.
    wanted = known if reference.keys() & loaded.keys() else expected
    missing = sorted(wanted.keys() - loaded.keys())
    if missing:
        raise InputError(f"{path}: missing: {_several(missing)}")
    tensors = {}
    for name, tensor in loaded.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        if not plain or not tensor.is_floating_point() or tensor.is_quantized:
            raise InputError(f"{path}: {name}: expected a tensor of floating-point numbers")
        if list(tensor.shape) != known[name]:
            raise InputError(
                f"{path}: {name}: expected shape {known[name]}, got {list(tensor.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {name} holds NaN or infinity")
        if name in reference and ".lora_B." in name and tensor.any():
            raise InputError(f"{path}: {name}: expected a reference that is the base, zeros here")
        tensors[name] = tensor.detach().float()
    return tensors


def _check_size(path: Path, most: int) -> None:
    """Before anything is read into memory: an archive of torch's no larger than it may be."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except zipfile.BadZipFile as error:
        raise InputError(f"{path}: expected an archive of torch.save: {error}") from error
    if size > most:
        raise InputError(
            f"{path} holds {size} bytes; what {CONFIG_FILE} asks for is {most} at most"
        )


def _several(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


@torch.no_grad()
def _encoder(config: AuthorsConfig, tensors: Mapping[str, torch.Tensor]) -> PreferenceEncoder:
    encoder = PreferenceEncoder(
        EncoderConfig(
            option_dim=config.input_dim,
            latent_dim=config.hidden_dim,
            hidden_dim=config.hidden_dim,
            aggregate=_AGGREGATES[config.context_agg_func],
            stochastic=config.sample_latents,
            num_heads=_NUM_HEADS if config.context_agg_func == "self-attention" else 1,
            pair_encoder=config.context_input_encoder,
            scale="softplus" if config.sample_latents else "sigmoid",
        )
    )

    def fill(linear: nn.Module, weight: str, bias: str) -> None:
        assert isinstance(linear, nn.Linear)
        given = tensors[_ENCODER + weight]
        linear.weight.zero_()
        linear.weight[:, : given.shape[1]] = given
        linear.bias.copy_(tensors[_ENCODER + bias])

    def fill_named(linear: nn.Module, name: str) -> None:
        fill(linear, f"{name}.weight", f"{name}.bias")

    if isinstance(encoder.h1, nn.Sequential):
        fill_named(encoder.h1[0], "inner_encoder.net.0")
        fill_named(encoder.h1[2], "inner_encoder.net.2")
    else:
        fill_named(encoder.h1, "inner_encoder")
    if encoder.config.aggregate == "attention":
        in_proj = "self_attention.in_proj_"
        fill(encoder.attention_qkv, f"{in_proj}weight", f"{in_proj}bias")
        fill_named(encoder.attention_out, "self_attention.out_proj")
    # A mean's h2 also reads the number of choices; what it has for that stays zero.
    fill_named(encoder.h2[0], "outer_encoder.net.0")
    fill_named(encoder.h2[2], "outer_encoder.net.2")
    first = encoder.h2[0]
    assert isinstance(first, nn.Linear)
    encoder.prior.copy_(encoder.h2(torch.zeros(first.in_features)))
    return encoder


@torch.no_grad()
def _modulator(
    config: AuthorsConfig,
    shape: BaseShape,
    film_layers: list[int],
    tensors: Mapping[str, torch.Tensor],
) -> Modulator:
    families = [FamilyConfig(family="film")]
    if config.tune_llm:
        families.append(FamilyConfig(family="static", sites=_LORA_SITES, rank=config.lora_r))
    modulator = Modulator(
        ModulatorConfig(latent_dim=config.hidden_dim, families=tuple(families)), shape
    )
    scale = config.lora_alpha / config.lora_r
    for site in modulator.layout.sites:
        if site.family == "static":
            for name in site.projections:
                path = _POLICY + _lora_path(config, film_layers, site.layer, name)
                key = f"{site.layer}_{name}"
                modulator.lora_a[key].copy_(tensors[f"{path}.lora_A.default.weight"])
                modulator.lora_b[key].copy_(tensors[f"{path}.lora_B.default.weight"] * scale)
        elif site.layer in film_layers:  # the others stay the identity
            half = site.width // 2
            for number, part in enumerate(("gamma", "beta")):
                path = _POLICY + _film_path(config, site.layer, part)
                rows = slice(site.offset + number * half, site.offset + (number + 1) * half)
                modulator.expand_weight[rows] = tensors[f"{path}.weight"]
                modulator.expand_bias[rows] = tensors[f"{path}.bias"]
    return modulator
