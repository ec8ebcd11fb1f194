"""OpCase: for every op, inputs worth testing and timing, with tolerance, bytes and flops.

Tests, opcheck and benchmarks all draw from `cases(op)`, which reads `ops/<op>/cases.py`, so that a
new backend meets the same inputs: empty, one-row, odd, strided and mixed-user batches.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fssa_kernels
from fssa_kernels.dispatch import lookup

Inputs = dict[str, Any]  # the arguments of the public function, by name

OPS = (
    "modulated_linear",
    "residual_film_rms_norm",
    "rope_kv_write",
    "paged_attention",
    "expand_modulation",
    "take_rows",
    "sample",
    "advance_step",
)

# Inputs are scaled so that outputs are of order one. In low precision the reference rounds up to
# three times (base product, sum, epilogue).
_TOLERANCES = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-11},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 3e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 2e-2},
}


def _as_they_are(inputs: Inputs, backend: str) -> Inputs:
    return inputs


@dataclass(frozen=True)
class OpCase:
    """One situation an op has to handle.

    `make(generator, dtype)` builds the inputs on the CPU; `differentiable` names the tensors that
    may require a gradient; `work(inputs)` counts (bytes, flops); `prepare(inputs, backend)` is what
    a user of that backend does once, when weights are loaded.
    """

    op: str
    name: str
    make: Callable[[torch.Generator, torch.dtype], Inputs]
    work: Callable[[Inputs], tuple[int, int]]
    differentiable: tuple[str, ...] = ()
    prepare: Callable[[Inputs, str], Inputs] = _as_they_are

    def inputs(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> Inputs:
        """Arguments of the public function, the same for the same seed; strides are kept."""
        made = self.make(torch.Generator().manual_seed(seed), dtype)
        return {name: _move(value, torch.device(device)) for name, value in made.items()}

    def run(self, inputs: Inputs, backend: str = "auto") -> Any:
        """The public function on these inputs."""
        return getattr(fssa_kernels, self.op)(**inputs, backend=backend)

    def tolerance(self, dtype: torch.dtype) -> dict[str, float]:
        """rtol and atol between a correct result in this dtype and the exact one."""
        return dict(_TOLERANCES[dtype])

    def bytes(self, inputs: Inputs) -> int:
        """Bytes a kernel must move: each input element that is needed once, each output once."""
        return self.work(inputs)[0]

    def flops(self, inputs: Inputs) -> int:
        """Floating-point operations of the products (a multiply-add counts two)."""
        return self.work(inputs)[1]

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def cases(op: str) -> tuple[OpCase, ...]:
    """Every case of an op; ValueError names the ops there are."""
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    return tuple(importlib.import_module(f"fssa_kernels.ops.{op}.cases").cases())


def written(op: str) -> tuple[str, ...]:
    """The arguments that an op writes in place, in the order of its schema."""
    return lookup(op).writes


def _move(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor) or device.type == "cpu":
        return value
    moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return moved.copy_(value)


def normal(
    g: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0
) -> Tensor:
    """Normal values of mean 0, the same numbers in every dtype up to rounding."""
    return (torch.randn(*shape, generator=g, dtype=torch.float64) * std).to(dtype)


def within_wider(t: Tensor) -> Tensor:
    """The same values as a view whose rows lie further apart, with NaN in between."""
    width = t.shape[1:].numel()
    view = t.new_full((t.shape[0], width + 5), float("nan"))[:, 3 : 3 + width].view(t.shape)
    return view.copy_(t)


def mixed_slots(g: torch.Generator, num_tokens: int, num_users: int) -> Tensor:
    """Mixed users; the first token belongs to slot 0."""
    slots = torch.randint(num_users, (num_tokens,), generator=g, dtype=torch.int32)
    slots[:1] = 0
    return slots


def num_bytes(*tensors: Tensor | None) -> int:
    """Bytes these tensors' elements take."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
