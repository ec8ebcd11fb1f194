"""Cases of residual_film_rms_norm: with and without residual and FiLM, strided, empty."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fssa_kernels.testing import Inputs, OpCase, mixed_slots, normal, num_bytes, within_wider


@dataclass(frozen=True)
class _Sizes:
    """Sizes of one residual_film_rms_norm case."""

    num_tokens: int = 5
    num_channels: int = 33
    residual: bool = True
    film: bool = True
    num_users: int = 3
    weight_offset: float = 0.0
    strided: bool = False
    fp32_side: bool = False
    low_rank: int = 0
    gated: bool = True

    def make(self, g: torch.Generator, dtype: torch.dtype) -> Inputs:
        side = torch.promote_types(dtype, torch.float32) if self.fp32_side else dtype
        shape = (self.num_tokens, self.num_channels)
        x = normal(g, *shape, dtype=dtype)
        inputs: Inputs = {
            "x": within_wider(x) if self.strided else x,
            "residual": normal(g, *shape, dtype=dtype) if self.residual else None,
            "weight": 1 + normal(g, self.num_channels, dtype=side, std=0.3),
            "eps": 1e-5,
            "weight_offset": self.weight_offset,
        }
        if self.low_rank:
            a = normal(g, self.low_rank, self.num_channels, dtype=side, std=self.num_channels**-0.5)
            inputs["lora_a"] = a
            if self.gated:
                gates = normal(g, self.num_users, self.low_rank, dtype=side)
                gates[0] = 0.0
                inputs["gates"] = within_wider(gates) if self.strided else gates
        if self.film:
            rows = normal(g, self.num_users, 2, self.num_channels, dtype=side, std=0.5)
            rows[:, 0] += 1
            rows[0, 0], rows[0, 1] = 1.0, 0.0
            inputs["rows"] = within_wider(rows) if self.strided else rows
        if self.film or (self.low_rank and self.gated):
            inputs["slots"] = mixed_slots(g, self.num_tokens, self.num_users)
        return inputs


def _work(inputs: Inputs) -> tuple[int, int]:
    x, rows, lora_a = inputs["x"], inputs.get("rows"), inputs.get("lora_a")
    total = 3 * num_bytes(x) + num_bytes(inputs["residual"], inputs["weight"])
    if rows is not None:
        total += int(inputs["slots"].unique().numel()) * num_bytes(rows[:1])
    flops = x.numel() * (5 + (inputs["residual"] is not None) + 2 * (rows is not None))
    if lora_a is not None:
        total += num_bytes(lora_a) + len(x) * len(lora_a) * x.element_size()
        flops += 2 * x.numel() * len(lora_a)
    return total, flops


_CASES = {
    "film": _Sizes(),
    "film-strided": _Sizes(strided=True),
    "film-fp32-side": _Sizes(strided=True, fp32_side=True),
    "film-no-residual": _Sizes(residual=False),
    "plain": _Sizes(film=False),
    "norm-only": _Sizes(film=False, residual=False, weight_offset=1.0),
    "offset": _Sizes(weight_offset=1.0, num_channels=64),
    "one-row": _Sizes(num_tokens=1),
    "one-channel": _Sizes(num_channels=1),
    "empty": _Sizes(num_tokens=0),
    "shrink": _Sizes(film=False, low_rank=6),
    "shrink-film-strided": _Sizes(num_tokens=19, strided=True, fp32_side=True, low_rank=17),
    "shrink-static": _Sizes(num_channels=150, residual=False, film=False, low_rank=3, gated=False),
}


def cases() -> Iterator[OpCase]:
    """Every case of residual_film_rms_norm."""
    for name, sizes in _CASES.items():
        tensors = ["x", "weight"]
        tensors += ["residual"] if sizes.residual else []
        tensors += ["rows"] if sizes.film else []
        if sizes.low_rank:  # inference only
            tensors = []
        yield OpCase("residual_film_rms_norm", name, sizes.make, _work, tuple(tensors))
