"""What the tests give models of transformers."""

from __future__ import annotations

import torch

from ..conditioned import LATENT_DIM

LENGTH = 11


def latents(count: int) -> torch.Tensor:
    return torch.randn(count, LATENT_DIM, generator=torch.Generator().manual_seed(7))


def token_batch(rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (rows, LENGTH), generator=generator)
