"""The modulation that CPU benchmarks serve: gated, rank 16, all seven linears, far from trivial."""

from __future__ import annotations

import torch

from fssa_runtime.conditioning.layout import ModulatorConfig
from fssa_runtime.conditioning.modulator import Modulator
from fssa_runtime.models.config import DecoderConfig

SITES = ("q", "k", "v", "o", "gate", "up", "down")
RANK = 16
LATENT_DIM = 16


def random_modulator(decoder: DecoderConfig) -> Modulator:
    """The same numbers every time, rounded to bf16: what is served, and what is merged by hand."""
    config = ModulatorConfig.model_validate(
        {
            "latent_dim": LATENT_DIM,
            "families": [{"family": "gated", "sites": SITES, "rank": RANK}],
        }
    )
    torch.manual_seed(0)
    modulator = Modulator(config, decoder)
    with torch.no_grad():
        for parameter in modulator.lora_b.values():
            parameter.normal_(std=0.02)
        for parameter in modulator.parameters():
            parameter.copy_(parameter.bfloat16())
    return modulator
