"""A small model with a random, far from trivial conditioning: what several tests steer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fssa_runtime.conditioning.checkpoint import Conditioning
from fssa_runtime.conditioning.choices import Choice
from fssa_runtime.conditioning.embedding import EmbeddingConfig
from fssa_runtime.conditioning.encoder import EncoderConfig, PreferenceEncoder
from fssa_runtime.conditioning.layout import ModulatorConfig
from fssa_runtime.conditioning.modulator import Modulator
from fssa_runtime.models.language_model import LanguageModel

from .models import write_model

ALL_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")

FAMILIES: dict[str, list[dict[str, Any]]] = {
    "film": [{"family": "film"}],
    "gated": [{"family": "gated", "sites": ALL_LINEARS, "rank": 3}],
    "gated-wide": [{"family": "gated", "sites": ALL_LINEARS, "rank": 8}],
    "gated-some": [{"family": "gated", "sites": ("q", "v", "o", "up"), "rank": 4}],
    "core": [{"family": "core", "sites": ALL_LINEARS, "rank": 2}],
    "static": [{"family": "static", "sites": ("q", "v"), "rank": 2}],
    "factors": [{"family": "factors", "sites": ALL_LINEARS, "rank": 2}],
    "some-layers": [
        {"family": "film", "layers": (1,)},
        {"family": "gated", "sites": ALL_LINEARS, "rank": 3, "layers": (2, 0)},
    ],
    "authors": [{"family": "static", "sites": ("q", "v"), "rank": 2}, {"family": "film"}],
    "mixed": [
        {"family": "core", "sites": ("q", "k", "v"), "rank": 2},
        {"family": "gated", "sites": ("gate", "up"), "rank": 3},
        {"family": "factors", "sites": ("down",), "rank": 2},
        {"family": "film"},
    ],
}

LATENT_DIM = 5


def small_model(folder: Path, name: str = "llama") -> LanguageModel:
    """A random model of the test suite's registry, loaded."""
    return LanguageModel.load(str(write_model(folder, name)))


def random_conditioning(model: LanguageModel, family: str, *, seed: int = 0) -> Conditioning:
    """Every parameter random and large enough that each site changes the logits."""
    torch.manual_seed(seed)
    config = ModulatorConfig.model_validate(
        {"latent_dim": LATENT_DIM, "families": FAMILIES[family]}
    )
    embedding = EmbeddingConfig()
    encoder = PreferenceEncoder(
        EncoderConfig(
            option_dim=embedding.width(model.decoder.config.hidden_size),
            latent_dim=LATENT_DIM,
            hidden_dim=16,
        )
    )
    modulator = Modulator(config, model.decoder.config)
    with torch.no_grad():
        for parameter in modulator.lora_b.values():
            parameter.normal_(std=0.2)
        modulator.expand_weight.normal_(std=0.2)
    return Conditioning(encoder.eval(), modulator.eval(), embedding, model.name, model.fingerprint)


def random_row(conditioning: Conditioning, seed: int) -> torch.Tensor:
    """A user's row from a random latent; pieces that are data (factors) are random too."""
    generator = torch.Generator().manual_seed(seed)
    row = conditioning.row(torch.randn(LATENT_DIM, generator=generator))
    start = conditioning.modulator.layout.generated_width
    row[start:] = 0.2 * torch.randn(len(row) - start, generator=generator)
    return row


CHOICES = (
    Choice("What is a cat?", "A small animal.", "Cats are many things, and more than many."),
    Choice("And a dog?", "Loyal.", "A dog is a dog is a dog, as they say."),
    Choice("Why?", "Because.", "There are several reasons for that, I think."),
)
