"""Random LoRA adapters in PEFT's layout, one a user, for the peers that serve adapters."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RANK = 16
SCALE = 0.06  # standard deviation of A and of B: the wrong adapter's text is a nat a token off
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# Adapters of a trace; of a small model, ten megabytes each, which a peer holds twice.
MAX_ADAPTERS = 128


def numbers(users: Sequence[int]) -> list[int]:
    """The adapter of each request: users in the order in which they come get 0, 1, ...

    After ``MAX_ADAPTERS`` users it begins again, and users share.
    """
    found: dict[int, int] = {}
    return [found.setdefault(user, len(found)) % MAX_ADAPTERS for user in users]


def adapter(model: Path, work: Path, index: int) -> Path:
    """The folder of adapter ``index``, written on first use: rank 16 on all seven linears.

    ``index`` is its seed. The weights are bf16, alpha is the rank (a scaling of one).
    """
    import torch
    from safetensors.torch import save_file

    folder = work / f"lora-{model.name}-r{RANK}-std{SCALE}" / str(index)
    if (folder / "adapter_config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    generator = torch.Generator().manual_seed(index)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for site, (inputs, outputs) in _sites(config).items():
            prefix = f"base_model.model.model.layers.{layer}.{site}"
            for name, shape in (("lora_A", (RANK, inputs)), ("lora_B", (outputs, RANK))):
                weight = torch.randn(shape, generator=generator) * SCALE
                tensors[f"{prefix}.{name}.weight"] = weight.to(torch.bfloat16)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [*ATTENTION, *MLP],
        "inference_mode": True,
    }
    # The configuration comes last and whole: its presence says that the adapter is complete.
    partial = folder / "adapter_config.json.part"
    partial.write_text(json.dumps(description), encoding="utf-8")
    os.replace(partial, folder / "adapter_config.json")
    return folder


def _sites(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Input and output features of each linear of a Llama layer."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, key = (config[f"num_{h}_heads"] * head_dim for h in ("attention", "key_value"))
    return {
        "self_attn.q_proj": (hidden, query),
        "self_attn.k_proj": (hidden, key),
        "self_attn.v_proj": (hidden, key),
        "self_attn.o_proj": (query, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
