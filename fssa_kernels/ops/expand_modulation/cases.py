"""Cases of expand_modulation."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fssa_kernels.testing import Inputs, OpCase, normal, num_bytes


@dataclass(frozen=True)
class _Sizes:
    """Sizes of one expand_modulation case."""

    num_latents: int = 3
    latent_size: int = 7
    width: int = 13

    def make(self, g: torch.Generator, dtype: torch.dtype) -> Inputs:
        wide = torch.promote_types(dtype, torch.float32)
        return {
            "z": normal(g, self.num_latents, self.latent_size, dtype=wide),
            "weight": normal(
                g, self.width, self.latent_size, dtype=dtype, std=self.latent_size**-0.5
            ),
            "bias": normal(g, self.width, dtype=dtype),
        }


def _work(inputs: Inputs) -> tuple[int, int]:
    z, weight = inputs["z"], inputs["weight"]
    total = num_bytes(z, weight, inputs["bias"]) + len(z) * len(weight) * z.element_size()
    return total, 2 * len(z) * weight.numel()


def cases() -> Iterator[OpCase]:
    """Every case of expand_modulation."""
    for name, sizes in {
        "several": _Sizes(),
        "one": _Sizes(num_latents=1, latent_size=1, width=1),
        "empty": _Sizes(num_latents=0),
    }.items():
        tensors = ("z", "weight", "bias")
        yield OpCase("expand_modulation", name, sizes.make, _work, tensors)
