"""The parts of a transformers model that a conditioning acts on, found by their usual names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..conditioning.layout import GROUPS, LINEARS, LinearName
from ..errors import InputError
from ..models.weights import fingerprint_of, tensor_digest

LEAVES: dict[LinearName, str] = {name: f"{name}_proj" for name in LINEARS}
MODULE_NAMES = ", ".join(LEAVES.values())


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that rows of a modulation table depend on (`layout.BaseShape`)."""

    num_layers: int
    hidden_size: int
    qkv_splits: tuple[int, int, int]
    gate_up_splits: tuple[int, int]

    def features(self, name: LinearName) -> tuple[int, int]:
        """Output and input features (N, K) of one projection."""
        if name in GROUPS["qkv"]:
            return self.qkv_splits[GROUPS["qkv"].index(name)], self.hidden_size
        if name in GROUPS["gate_up"]:
            return self.gate_up_splits[GROUPS["gate_up"].index(name)], self.hidden_size
        inputs = self.qkv_splits[0] if name == "o" else self.gate_up_splits[0]
        return self.hidden_size, inputs


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model: the one list of modules whose members have a ``q_proj``.

    Raises:
        InputError: no such list, or several (a model of images and text: give its text model).
    """
    found: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and not inside and any(map(_has_q_proj, module)):
            found[path] = list(module)
    if not found:
        leaves = sorted({path.rpartition(".")[2] for path, m in model.named_modules() if _flat(m)})
        raise InputError(
            f"{type(model).__name__}: expected decoder layers with linears named {MODULE_NAMES}; "
            f"its linears are named {', '.join(leaves) or 'nothing at all'}"
        )
    if len(found) > 1:
        raise InputError(
            f"{type(model).__name__} has several stacks of layers ({', '.join(found)}); "
            "expected one: give the text model alone"
        )
    return next(iter(found.values()))


def layer_linear(layer: nn.Module, index: int, name: LinearName) -> nn.Linear:
    """The linear of one projection of a layer; inside PEFT's own wrapper, if there is one.

    Raises:
        InputError: none or several of that name, one whose weight is not a plain matrix, or one of
            an MLP's in a layer with experts, where it would be the shared expert's alone.
    """
    leaf = LEAVES[name]
    where = f"layer {index} of the model ({type(layer).__name__})"
    experts = [path for path, _ in layer.named_modules() if "expert" in path.rpartition(".")[2]]
    if experts and name in (*GROUPS["gate_up"], "down"):
        raise InputError(f"{where} has experts ({experts[0]}): expected one MLP for {leaf}")
    found = {path: m for path, m in layer.named_modules() if path.rpartition(".")[2] == leaf}
    if len(found) != 1:
        got = ", ".join(found) or "none of that name"
        raise InputError(f"{where}: expected one module named {leaf}, got {got}")
    ((path, module),) = found.items()
    while hasattr(module, "base_layer"):
        module = module.base_layer
    weight = getattr(module, "weight", None)
    plain = isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.ndim == 2
    if not isinstance(module, nn.Linear) or not plain:
        raise InputError(
            f"{where}: {path}: expected a torch.nn.Linear with a plain floating-point matrix, "
            f"got {type(module).__name__}"
        )
    return module


def base_shape(model: nn.Module) -> ModelShape:
    """The sizes a new conditioning for this model is made with.

    Raises:
        InputError: as `decoder_layers` and `layer_linear` do; ``gate`` and ``up`` may be missing
            where the model's configuration names its ``intermediate_size``.
    """
    layers = decoder_layers(model)
    q, k, v = (layer_linear(layers[0], 0, name) for name in GROUPS["qkv"])
    try:
        intermediate = layer_linear(layers[0], 0, "up").out_features
    except InputError:
        named = getattr(getattr(model, "config", None), "intermediate_size", None)
        if not isinstance(named, int):
            raise
        intermediate = named
    splits = (q.out_features, k.out_features, v.out_features)
    return ModelShape(len(layers), q.in_features, splits, (intermediate, intermediate))


def base_fingerprint(model: Any) -> str:
    """What `LanguageModel.fingerprint` is for the same weights on disk, from a model in memory.

    Parts that PEFT's LoRA added do not count. Weights that were trained, merged or rounded to
    float16 give another fingerprint.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    tied = bool(getattr(inner.config, "tie_word_embeddings", False))
    digests = {}
    for name, tensor in _base_tensors(inner):
        if not (tied and name == "lm_head.weight"):
            digests[name] = tensor_digest(tensor)
    return fingerprint_of(inner.config.model_type, digests)


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == OWN_MODULES or any(part.startswith("lora_") for part in parts):
            continue
        yield ".".join(part for part in parts if part != "base_layer"), tensor


# The name under which a conditioning that is being trained becomes part of a model.
OWN_MODULES = "fssa"


def _has_q_proj(layer: nn.Module) -> bool:
    return any(path.rpartition(".")[2] == LEAVES["q"] for path, _ in layer.named_modules())


def _flat(module: nn.Module) -> bool:
    """Whether it holds a matrix of its own and no other modules: a linear of any kind."""
    weight = getattr(module, "weight", None)
    is_matrix = isinstance(weight, torch.Tensor) and weight.ndim == 2
    return is_matrix and not isinstance(module, nn.Embedding) and not list(module.children())
