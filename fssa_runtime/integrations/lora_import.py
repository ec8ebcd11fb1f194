"""PEFT LoRA adapters as families of ours: one for everybody (``static``), or one for each user
(``factors``, in one batch)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from ..conditioning.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Conditioning
from ..conditioning.embedding import EmbeddingConfig
from ..conditioning.encoder import EncoderConfig, PreferenceEncoder
from ..conditioning.layout import (
    GROUPS,
    LINEARS,
    BaseShape,
    FamilyConfig,
    LinearName,
    ModulatorConfig,
    RowLayout,
)
from ..conditioning.modulator import Modulator
from ..conditioning.user_weights import UserWeights
from ..errors import InputError
from .modules import LEAVES, ModelShape

_TENSOR = re.compile(
    rf"(?P<module>(?:.*\.)?layers\.(?P<layer>\d+)\.(?:\w+\.)*(?P<leaf>{'|'.join(LEAVES.values())}))"
    r"\.lora_(?P<side>[AB])\.weight"
)
_NAMES: dict[str, LinearName] = {leaf: name for name, leaf in LEAVES.items()}
# Fields that say nothing about what the saved tensors compute.
# fmt: off
_HARMLESS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha",
    "lora_dropout", "use_rslora", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "runtime_config", "qalora_group_size", "ensure_weight_tying",
}
# fmt: on
# Others change the base's own weights, which an adapter alone does not tell.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraAdapter:
    """``(A [r, K], B [N, r])`` float32 by layer and name, PEFT's scale in B; r may differ."""

    factors: Mapping[tuple[int, LinearName], tuple[torch.Tensor, torch.Tensor]]

    @property
    def rank(self) -> int:
        """The largest r."""
        return max(len(lora_a) for lora_a, _ in self.factors.values())

    @property
    def sites(self) -> tuple[LinearName, ...]:
        """Linears that are adapted in some layer."""
        return tuple(n for n in LINEARS if any(name == n for _, name in self.factors))


def read_lora(folder: Path, shape: BaseShape) -> LoraAdapter:
    """Read a PEFT LoRA folder for a base of this shape; safetensors only.

    The scale (``lora_alpha / r``, by ``rank_pattern`` and ``alpha_pattern``; ``/ sqrt(r)`` with
    rsLoRA) is put into B.

    Raises:
        InputError: no such folder, damaged or missing files, another kind of adapter, an option
            that a LoRA's two matrices do not express, a tensor for what is not a linear of a
            decoder layer, one side of a pair, a wrong shape, NaN or infinity.
    """
    config = _read_config(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    try:
        tensors = load(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; only safetensors are read") from error
    except SafetensorError as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error
    sizes = ModelShape(shape.num_layers, shape.hidden_size, shape.qkv_splits, shape.gate_up_splits)
    sides: dict[tuple[int, LinearName], dict[str, torch.Tensor]] = {}
    modules: dict[tuple[int, LinearName], str] = {}
    for name, tensor in sorted(tensors.items()):
        match = _TENSOR.fullmatch(name)
        if match is None or int(match["layer"]) >= shape.num_layers:
            raise InputError(
                f"{path}: {name}: expected lora_A or lora_B of {', '.join(_NAMES)} in one of "
                f"{shape.num_layers} layers"
            )
        if not tensor.is_floating_point() or tensor.ndim != 2:
            raise InputError(f"{path}: {name}: expected a matrix, got {list(tensor.shape)}")
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {name} holds NaN or infinity")
        key = int(match["layer"]), _NAMES[match["leaf"]]
        if match["side"] in sides.setdefault(key, {}):
            raise InputError(f"{path}: {name}: a second adapter of the same linear")
        sides[key][match["side"]] = tensor.float()
        modules[key] = match["module"].removeprefix("base_model.model.")
    if not sides:
        raise InputError(f"{path}: expected tensors of a LoRA, got none")
    factors = {}
    for key, pair in sorted(sides.items()):
        if len(pair) != 2:
            raise InputError(f"{path}: {modules[key]}: lora_{_missing(pair)} is missing")
        rank, scale = _scale(config, modules[key], folder / CONFIG_FILE)
        rows, columns = sizes.features(key[1])
        expected, got = [[rank, columns], [rows, rank]], [list(pair[s].shape) for s in "AB"]
        if expected != got:
            raise InputError(
                f"{path}: {modules[key]}: expected A and B of shapes {expected[0]} and "
                f"{expected[1]}, got {got[0]} and {got[1]}"
            )
        factors[key] = (pair["A"], pair["B"] * scale)
    return LoraAdapter(factors)


def with_static(
    adapter: LoraAdapter,
    shape: BaseShape,
    *,
    base_model: str,
    base_fingerprint: str,
    beside: Conditioning | None = None,
) -> Conditioning:
    """A conditioning in which everybody has this LoRA, users of ``beside`` (if any) their own too.

    Without ``beside`` nothing depends on the user, and the encoder is a formality.

    Raises:
        InputError: the LoRA adapts q, k or v (or gate, up) where ``beside`` modulates any of them:
            they share one matrix.
    """
    static = FamilyConfig(family="static", sites=adapter.sites, rank=adapter.rank)
    others = () if beside is None else beside.modulator.config.families
    latent_dim = 1 if beside is None else beside.modulator.config.latent_dim
    try:
        config = ModulatorConfig(latent_dim=latent_dim, families=(*others, static))
    except ValueError as error:
        raise InputError(
            f"this LoRA cannot stand beside the conditioning's own: {error}"
        ) from error
    modulator = Modulator(config, shape)
    with torch.no_grad():
        if beside is not None:
            # Static sites have no piece of a row, so rows stay what they were.
            own = modulator.state_dict()
            for name, tensor in beside.modulator.state_dict().items():
                own[name].copy_(tensor)
        for site in modulator.layout.sites:
            for name in site.projections if site.family == "static" else ():
                key = f"{site.layer}_{name}"
                if beside is not None and key in beside.modulator.lora_a:
                    continue
                lora_a, lora_b = modulator.lora_a[key], modulator.lora_b[key]
                _padded(adapter, site.layer, name, lora_a, lora_b)
    if beside is None:
        return _without_encoder(modulator.eval(), shape, base_model, base_fingerprint)
    return Conditioning(
        beside.encoder, modulator.eval(), beside.embedding, base_model, base_fingerprint,
        dict(beside.notes),
    )  # fmt: skip


def as_users(
    adapters: Mapping[str, LoraAdapter],
    shape: BaseShape,
    *,
    base_model: str,
    base_fingerprint: str,
) -> tuple[Conditioning, dict[str, UserWeights]]:
    """Several LoRAs for one batch: a conditioning of ``factors`` and everybody's weights in it.

        conditioning, users = as_users({"ana": ana, "ben": ben}, model.decoder.config, ...)
        LLM(model, conditioning).generate(prompts, users=[users["ana"], users["ben"]])

    Ranks and linears may differ; a row holds the largest of each, zeros elsewhere.

    Raises:
        InputError: no adapters.
    """
    if not adapters:
        raise InputError("adapters: expected at least one, got none")
    sites = tuple(n for n in LINEARS if any(n in a.sites for a in adapters.values()))
    rank = max(adapter.rank for adapter in adapters.values())
    family = FamilyConfig(family="factors", sites=sites, rank=rank)
    modulator = Modulator(ModulatorConfig(latent_dim=1, families=(family,)), shape)
    conditioning = _without_encoder(modulator.eval(), shape, base_model, base_fingerprint)
    users = {
        name: UserWeights.of_row(_row(modulator.layout, adapter))
        for name, adapter in adapters.items()
    }
    return conditioning, users


def _row(layout: RowLayout, adapter: LoraAdapter) -> torch.Tensor:
    row = layout.identity()
    for site in layout.sites:
        # Views of the row: what is written there is written in it.
        lora_a, lora_b = (part[0] for part in RowLayout.factors(site, row[None]))
        for name in site.projections:
            index = GROUPS[site.group].index(name)
            start = sum(site.splits[:index])
            a = lora_a[index * site.rank : (index + 1) * site.rank]
            _padded(adapter, site.layer, name, a, lora_b[start : start + site.splits[index]])
    return row


def _padded(
    adapter: LoraAdapter, layer: int, name: LinearName, lora_a: torch.Tensor, lora_b: torch.Tensor
) -> None:
    """Write a linear's factors into ``[R, K]`` and ``[N, R]``, zeros beyond the adapter's rank."""
    lora_a.zero_()
    lora_b.zero_()
    if (layer, name) in adapter.factors:
        a, b = adapter.factors[layer, name]
        lora_a[: len(a)] = a
        lora_b[:, : len(a)] = b


def _without_encoder(
    modulator: Modulator, shape: BaseShape, base_model: str, base_fingerprint: str
) -> Conditioning:
    """Where nothing comes from choices: the smallest encoder there is, in front of no row."""
    embedding = EmbeddingConfig(pooling="last")
    config = EncoderConfig(
        option_dim=embedding.width(shape.hidden_size), latent_dim=1, hidden_dim=1
    )
    encoder = PreferenceEncoder(config).eval()
    return Conditioning(encoder, modulator, embedding, base_model, base_fingerprint)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"{path}: expected peft_type 'LORA', got {got!r}")
    for name, value in config.items():
        if name == "init_lora_weights":
            refused = value not in _INITIALISATIONS
        elif name == "bias":
            refused = value != "none"
        else:
            refused = bool(value) and name not in _HARMLESS
        if refused:
            raise InputError(
                f"{path}: {name} = {value!r}: expected a plain LoRA, two matrices a linear on a "
                "base that is left as it is"
            )
    return config


def _scale(config: Mapping[str, Any], module: str, path: Path) -> tuple[int, float]:
    """The rank of a module and its scale, as PEFT's patterns say."""
    rank = _by_pattern(config, "rank_pattern", "r", module, path)
    alpha = _by_pattern(config, "alpha_pattern", "lora_alpha", module, path)
    if not isinstance(rank, int) or rank < 1:
        raise InputError(f"{path}: r of {module}: expected a positive integer, got {rank!r}")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise InputError(f"{path}: lora_alpha of {module}: expected a number, got {alpha!r}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(
    config: Mapping[str, Any], patterns: str, default: str, module: str, path: Path
) -> Any:
    given = config.get(patterns) or {}
    for pattern, value in given.items() if isinstance(given, dict) else ():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        except re.error as error:
            raise InputError(f"{path}: {patterns}: {pattern!r} is no pattern: {error}") from error
    return config.get(default)


def _missing(pair: Mapping[str, torch.Tensor]) -> str:
    return "B" if "A" in pair else "A"
