"""From safetensors to a `Decoder`: names, stacking, checks, and the base's fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import InputError
from .config import DecoderConfig
from .decoder import Decoder

# Elements of each tensor that enter the fingerprint: enough to tell any two trainings of one
# architecture apart, few enough that a large model is fingerprinted while it loads.
FINGERPRINT_SAMPLES = 1024


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of the index if there is one.

    Raises:
        InputError: no weights, a shard missing, or an index that names a file outside the folder.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise InputError(
            f"{folder} holds no model.safetensors nor model.safetensors.index.json; "
            "only safetensors weights are read"
        )
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{index} is not a safetensors index: {error}") from error
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"{index} names {name!r}, which is not a file in that folder")
    return [folder / name for name in names]


def load_decoder(
    config: DecoderConfig, folder: Path, dtype: torch.dtype, device: torch.device | str
) -> tuple[Decoder, str]:
    """Read every tensor of ``folder`` into a new decoder; also the base's fingerprint.

    The fingerprint covers names, shapes and sampled values rounded to bfloat16, so the same
    weights kept in bfloat16 or float32, in one file or in shards, have the same fingerprint.

    Raises:
        InputError: corrupt file, tensor missing, unexpected or of the wrong shape.
    """
    decoder = Decoder(config, dtype, device)
    targets = _targets(decoder)
    digests: dict[str, str] = {}
    for name, tensor in _tensors(tensor_files(folder)):
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        if name.endswith("rotary_emb.inv_freq"):  # recomputed; old files carry it
            continue
        if name not in targets:
            raise InputError(f"{folder}: unexpected tensor {name!r} for {config.architecture}")
        target = targets[name]
        if target.shape != tensor.shape:
            raise InputError(
                f"{folder}: {name} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(target.shape)}"
            )
        target.copy_(tensor)
        digests[name] = tensor_digest(tensor)
    missing = sorted(set(targets) - set(digests))
    if missing:
        raise InputError(f"{folder}: {len(missing)} tensors are missing, first {missing[0]!r}")
    return decoder, fingerprint_of(config.architecture, digests)


def _tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{path} is not a readable safetensors file: {error}") from error


def fingerprint_of(architecture: str, digests: Mapping[str, str]) -> str:
    """Of a base: its architecture (``model_type``) and `tensor_digest` of each tensor by name."""
    summary = json.dumps([architecture, sorted(digests.items())]).encode()
    return hashlib.sha256(summary).hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """Of a tensor's shape and of sampled values, rounded to bfloat16."""
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // FINGERPRINT_SAMPLES)
    sample = flat[::step].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()
    return hashlib.sha256(repr(list(tensor.shape)).encode() + sample).hexdigest()


def _targets(decoder: Decoder) -> dict[str, torch.Tensor]:
    """Where each tensor of a checkpoint goes: views into the decoder's stacked weights."""
    config = decoder.config
    targets: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": decoder.embedding.data,
        "model.norm.weight": decoder.final_norm.data,
    }
    if not config.tie_embeddings:
        targets["lm_head.weight"] = decoder.lm_head.data
    for i, layer in enumerate(decoder.blocks):
        stacks = {
            ("qkv", "self_attn.", ("q_proj", "k_proj", "v_proj")): config.qkv_splits,
            ("o", "self_attn.", ("o_proj",)): (config.hidden_size,),
            ("gate_up", "mlp.", ("gate_proj", "up_proj")): config.gate_up_splits,
            ("down", "mlp.", ("down_proj",)): (config.hidden_size,),
        }
        for (group, block, projections), splits in stacks.items():
            for kind in ("weight", "bias"):
                stacked = getattr(layer, f"{group}_{kind}")
                if stacked is None:
                    continue
                for projection, part in zip(projections, stacked.data.split(splits), strict=True):
                    targets[f"model.layers.{i}.{block}{projection}.{kind}"] = part
        targets[f"model.layers.{i}.input_layernorm.weight"] = layer.input_norm.data
        targets[f"model.layers.{i}.post_attention_layernorm.weight"] = layer.post_norm.data
        if layer.q_norm is not None and layer.k_norm is not None:
            targets[f"model.layers.{i}.self_attn.q_norm.weight"] = layer.q_norm.data
            targets[f"model.layers.{i}.self_attn.k_norm.weight"] = layer.k_norm.data
    return targets
