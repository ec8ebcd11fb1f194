"""Write a Llama checkpoint (bf16 safetensors) as a BF16 or F16 GGUF, without its tokenizer.

    python -m benchmarks.peers.to_gguf MODEL_FOLDER OUT.gguf --weights bf16

As bf16 the weights keep their bits; f16 rounds what is smaller than 2^-14 and fails on what is too
large. Norms become float32, which is what llama.cpp computes them in. The
benchmark speaks in token ids, so the file says it has no vocabulary but its size.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def convert(model: Path, out: Path, weights: str = "bf16") -> None:
    """Write ``model`` (``config.json`` and ``model.safetensors``) to ``out``, replacing it whole.

    ``weights``: "bf16" or "f16". Raises ``ValueError`` for anything but a plain Llama in bf16, and
    for a weight that f16 cannot hold.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    _expect("architectures", config["architectures"], ["LlamaForCausalLM"])
    _expect("attention_bias", config.get("attention_bias", False), False)
    _expect("mlp_bias", config.get("mlp_bias", False), False)
    _expect("hidden_act", config["hidden_act"], "silu")
    _expect("rope_type", rope.get("rope_type", "default"), "default")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads

    partial = out.with_name(out.name + ".part")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_name(model.name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{weights.upper()}"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta") or config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, bits in read_bf16(model / "model.safetensors").items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings", False):
            continue
        if name.endswith("q_proj.weight"):
            bits = interleave(bits, heads)
        elif name.endswith("k_proj.weight"):
            bits = interleave(bits, kv_heads)
        if bits.ndim == 1:
            writer.add_tensor(gguf_name(name), _widened(bits))
        elif weights == "f16":
            with np.errstate(over="ignore"):
                halves = _widened(bits).astype(np.float16)
            if not np.isfinite(halves).all():
                raise ValueError(f"{name}: expected weights that f16 can hold, got larger ones")
            writer.add_tensor(gguf_name(name), halves)
        else:
            raw = np.ascontiguousarray(bits).view(np.uint8)
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(gguf_name(name), raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, out)


def _widened(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def interleave(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Reorder the rows of ``weight`` ``[heads·D, K]`` for the rotary embedding of the format.

    The checkpoint rotates row i of a head with row i + D/2, GGUF's Llama row 2i with row 2i + 1.
    """
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def gguf_name(name: str) -> str:
    """The name a tensor of a Llama checkpoint has in GGUF."""
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    words = name.split(".")
    inner = ".".join(words[3:-1])
    if words[:2] != ["model", "layers"] or words[-1] != "weight" or inner not in _LAYER_NAMES:
        raise ValueError(f"{name}: not a tensor of a plain Llama")
    return f"blk.{words[2]}.{_LAYER_NAMES[inner]}.weight"


def read_bf16(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a safetensors file, as the uint16 bits of bf16, mapped and not copied."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + size)
    tensors = {}
    for name, entry in header.items():
        _expect(f"{name}.dtype", entry["dtype"], "BF16")
        begin, end = entry["data_offsets"]
        tensors[name] = data[begin:end].view(np.uint16).reshape(entry["shape"])
    return tensors


def _expect(what: str, got: Any, expected: Any) -> None:
    if got != expected:
        raise ValueError(f"{what}: expected {expected!r}, got {got!r}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", choices=("bf16", "f16"), default="bf16")
    arguments = parser.parse_args()
    convert(arguments.model, arguments.out, arguments.weights)
    return 0


if __name__ == "__main__":
    sys.exit(main())
