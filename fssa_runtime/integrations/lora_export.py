"""One user as an ordinary PEFT LoRA folder, for engines that know nothing of users.

For a fixed row every low-rank family is a LoRA, exactly (METHOD.md section 4):

    gated  lora_A = A, lora_B = B·diag(g)     core  lora_A = A, lora_B = B·M
    static lora_A = A, lora_B = B             factors: the user's own A and B

all with alpha = r, so that PEFT's scale is 1. FiLM's γ multiplies the whole block output, residual
included: a change of full rank, which no LoRA is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..conditioning.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Conditioning
from ..conditioning.layout import LinearName, RowLayout, Site
from ..errors import InputError
from ..files import write_atomically
from .modules import LEAVES

# Where PEFT's file keeps the modules of a causal language model with Llama's module names.
_BLOCKS: dict[LinearName, str] = {
    **dict.fromkeys(("q", "k", "v", "o"), "self_attn"),
    **dict.fromkeys(("gate", "up", "down"), "mlp"),
}


@torch.no_grad()
def user_factors(
    conditioning: Conditioning, row: torch.Tensor
) -> dict[tuple[int, LinearName], tuple[torch.Tensor, torch.Tensor]]:
    """``(A [R, K], B [N, R])`` float32 of every modulated linear, by layer and name, of one user.

    Args:
        row: the user's row ``[W]`` of the modulation table, as `Conditioning.row` gives it.

    Raises:
        InputError: a row of another length or not finite, or a film family: no LoRA equals it.
    """
    modulator = conditioning.modulator
    layout = modulator.layout
    if any(site.family == "film" for site in layout.sites):
        raise InputError(
            "this conditioning cannot be exported as a LoRA: its film family multiplies every "
            "block's whole output by γ(z), a change of full rank, and a LoRA adds one of low rank"
        )
    if row.shape != (layout.width,) or not torch.isfinite(row).all():
        raise InputError(
            f"row: expected {layout.width} finite numbers, got shape {list(row.shape)}"
        )
    table = row.detach().float().cpu()[None]
    factors = {}
    for site in layout.sites:
        for name in site.projections:
            factors[site.layer, name] = _factors(conditioning, site, name, table)
    return factors


def export_lora(conditioning: Conditioning, row: torch.Tensor, folder: Path) -> None:
    """Write a user as ``adapter_config.json`` and ``adapter_model.safetensors`` of PEFT's LoRA,
    in place of those that are there.

    Raises:
        InputError: as `user_factors` does; nothing is written then.
    """
    factors = user_factors(conditioning, row)
    tensors = {}
    ranks: dict[str, int] = {}
    for (layer, name), (lora_a, lora_b) in factors.items():
        path = f"base_model.model.model.layers.{layer}.{_BLOCKS[name]}.{LEAVES[name]}"
        tensors[f"{path}.lora_A.weight"] = lora_a.contiguous()
        tensors[f"{path}.lora_B.weight"] = lora_b.contiguous()
        ranks[LEAVES[name]] = len(lora_a)
    rank = max(ranks.values())
    others: dict[str, Any] = {leaf: r for leaf, r in ranks.items() if r != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": conditioning.base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS_FILE, save(tensors))
    write_atomically(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def _factors(
    conditioning: Conditioning, site: Site, name: LinearName, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    index, rank = site.members.index(name), site.rank
    if site.family == "factors":
        lora_a, lora_b = (part[0] for part in RowLayout.factors(site, table))
        start = sum(site.splits[:index])
        own_a = lora_a[index * rank : (index + 1) * rank]
        return own_a.clone(), lora_b[start : start + site.splits[index]].clone()
    key = f"{site.layer}_{name}"
    lora_a = conditioning.modulator.lora_a[key].detach().float().cpu()
    lora_b = conditioning.modulator.lora_b[key].detach().float().cpu()
    if site.family == "static":
        return lora_a, lora_b
    piece = RowLayout.piece(site, table)[0]
    if site.family == "gated":
        return lora_a, lora_b * piece[index * rank : (index + 1) * rank]
    return lora_a, lora_b @ piece[index]
