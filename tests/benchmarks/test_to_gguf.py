"""What llama.cpp is given: the weights of a checkpoint, as bf16 or as f16."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.peers.to_gguf import convert

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 8,
    "intermediate_size": 12,
    "max_position_embeddings": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 0,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 16,
}


def checkpoint(folder: Path, embedding: torch.Tensor) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(8)}
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    return folder


@pytest.mark.parametrize("weights", ["bf16", "f16"])
def test_weights_keep_their_values_and_norms_are_float32(weights: str, tmp_path: Path) -> None:
    embedding = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    convert(checkpoint(tmp_path, embedding), tmp_path / "out.gguf", weights)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    written = tensors["token_embd.weight"]
    assert written.tensor_type.name == weights.upper()
    values = gguf.quants.dequantize(written.data, written.tensor_type)
    np.testing.assert_array_equal(values.reshape(16, 8), embedding.float().numpy())
    assert tensors["output_norm.weight"].tensor_type.name == "F32"


def test_a_weight_that_f16_cannot_hold_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, torch.full((16, 8), 1e6))
    with pytest.raises(ValueError, match="expected weights that f16 can hold"):
        convert(folder, tmp_path / "out.gguf", "f16")
    assert not (tmp_path / "out.gguf").exists()
