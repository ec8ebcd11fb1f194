"""What the decoder needs to know of an architecture, and the architectures it knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..errors import InputError

Activation = Literal["silu_mul", "gelu_tanh_mul"]

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu_mul",
    "gelu_pytorch_tanh": "gelu_tanh_mul",
    "gelu_tanh": "gelu_tanh_mul",
}


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a pre-norm decoder with rotary positions and a gated MLP.

    Letters as in the design pages: ``C`` hidden size, ``L`` layers, ``H`` and ``Hkv`` heads,
    ``D`` head dim, ``V`` vocabulary. ``windows[l]`` is the attention window of layer ``l`` in
    tokens, 0 for none.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope_inv_freq: tuple[float, ...]
    rope_attention_scaling: float
    activation: Activation
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    norm_weight_offset: float
    embedding_scale: float
    windows: tuple[int, ...]

    @property
    def qkv_splits(self) -> tuple[int, int, int]:
        """Rows of the stacked q, k, v matrix that belong to each."""
        kv = self.num_kv_heads * self.head_dim
        return (self.num_heads * self.head_dim, kv, kv)

    @property
    def gate_up_splits(self) -> tuple[int, int]:
        """Rows of the stacked gate, up matrix that belong to each."""
        return (self.intermediate_size, self.intermediate_size)


def _llama(hf: Any) -> dict[str, Any]:
    bias = bool(getattr(hf, "attention_bias", False))
    mlp_bias = bool(getattr(hf, "mlp_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": mlp_bias}


def _mistral(hf: Any) -> dict[str, Any]:
    return {"windows": (int(getattr(hf, "sliding_window", None) or 0),) * hf.num_hidden_layers}


def _qwen2(hf: Any) -> dict[str, Any]:
    return {"qkv_bias": True, "windows": _windows_by_layer_type(hf)}


def _qwen3(hf: Any) -> dict[str, Any]:
    bias = bool(getattr(hf, "attention_bias", False))
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "qk_norm": True,
        "windows": _windows_by_layer_type(hf),
    }


def _gemma(hf: Any) -> dict[str, Any]:
    bias = bool(getattr(hf, "attention_bias", False))
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "norm_weight_offset": 1.0,
        "embedding_scale": hf.hidden_size**0.5,
    }


def _windows_by_layer_type(hf: Any) -> tuple[int, ...]:
    window = int(getattr(hf, "sliding_window", None) or 0)
    kinds = getattr(hf, "layer_types", None) or ["full_attention"] * hf.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


ARCHITECTURES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
}


def decoder_config(hf: Any) -> DecoderConfig:
    """Translate a Hugging Face configuration object.

    Raises:
        InputError: an architecture, activation or rotary scaling this decoder does not have.
    """
    if hf.model_type not in ARCHITECTURES:
        raise InputError(
            f"architecture {hf.model_type!r} is not supported; expected one of "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    # Gemma's older files name an exact GELU that its own code never used.
    activation_name = getattr(hf, "hidden_activation", None) or hf.hidden_act
    if hf.model_type == "gemma" and activation_name == "gelu":
        activation_name = "gelu_pytorch_tanh"
    if activation_name not in ACTIVATIONS:
        raise InputError(
            f"activation {activation_name!r} is not supported; expected one of "
            f"{', '.join(sorted(ACTIVATIONS))}"
        )
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    inv_freq, scaling = _rope(hf, head_dim)
    known: dict[str, Any] = {
        "architecture": hf.model_type,
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "intermediate_size": hf.intermediate_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads,
        "head_dim": head_dim,
        "max_positions": hf.max_position_embeddings,
        "norm_eps": hf.rms_norm_eps,
        "rope_inv_freq": inv_freq,
        "rope_attention_scaling": scaling,
        "activation": ACTIVATIONS[activation_name],
        "tie_embeddings": bool(hf.tie_word_embeddings),
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "norm_weight_offset": 0.0,
        "embedding_scale": 1.0,
        "windows": (0,) * hf.num_hidden_layers,
    }
    return DecoderConfig(**{**known, **ARCHITECTURES[hf.model_type](hf)})


def _rope(hf: Any, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Inverse frequencies [D/2] and the factor on cos and sin, position-independent kinds only."""
    parameters = dict(getattr(hf, "rope_parameters", None) or {})
    kind = parameters.get("rope_type", "default")
    partial = parameters.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise InputError(f"partial_rotary_factor {partial} is not supported; expected 1.0")
    if kind == "default":
        theta = parameters.get("rope_theta") or getattr(hf, "rope_theta", None)
        if theta is None:
            raise InputError("the model's config.json has no rope_theta")
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return tuple((1.0 / (theta**exponents)).tolist()), 1.0
    # "dynamic" and "longrope" change the frequencies with the length of the text, which cached
    # keys of earlier lengths would not follow.
    if kind not in ("linear", "llama3", "yarn"):
        raise InputError(
            f"rope_type {kind!r} is not supported; expected default, linear, llama3 or yarn"
        )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"))
    return tuple(inv_freq.tolist()), float(scaling)
