"""The gate every speed stands behind: as good as plain PyTorch in the same dtype.

Both are held against fp64: the error may be twice PyTorch's, plus rounding luck.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fssa_kernels
from fssa_kernels.testing import Inputs, OpCase, written

# Errors below this are luck: units in the last place of the largest value, or of one.
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}

_NOT_WIDENED = {
    "sample": ("temperature", "top_p", "min_p", "uniform"),
    "rope_kv_write": ("cos_sin",),
    "advance_step": ("logprobs", "uniform", "draws", "log_logprobs"),
}


@dataclass(frozen=True)
class Judgement:
    """How far a result is off, how far it may be, and what is wrong with it ("" for nothing)."""

    error: float
    allowed: float
    fault: str = ""

    @property
    def good(self) -> bool:
        return not self.fault


def outputs(op: str, inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    """All a call makes: what it returns, and what it writes, on copies of that."""
    names = written(op)
    inputs = {name: _copy(v) if name in names else v for name, v in inputs.items()}
    result = getattr(fssa_kernels, op)(**inputs, backend=backend)
    if not isinstance(result, tuple):
        result = () if result is None else (result,)
    return (*result, *(inputs[name] for name in names))


def widened(op: str, inputs: Inputs) -> Inputs:
    """The same inputs in fp64."""
    fixed = _NOT_WIDENED.get(op, ())
    return {
        name: value.double() if _is_float(value) and name not in fixed else value
        for name, value in inputs.items()
    }


def judge(
    got: Sequence[Tensor],
    plain: Sequence[Tensor],
    exact: Sequence[Tensor],
    *,
    times: float = 2.0,
) -> Judgement:
    """Whether every tensor of `got` is at most `times` as far from `exact` as `plain` is."""
    worst = Judgement(0.0, 0.0)
    for index, (mine, torchs, right) in enumerate(zip(got, plain, exact, strict=True)):
        mine, torchs, right = (t.detach().to(right.device) for t in (mine, torchs, right))
        if mine.shape != right.shape:
            return Judgement(0.0, 0.0, f"output {index}: shape {tuple(mine.shape)}")
        if not right.is_floating_point():
            if not torch.equal(mine, right):
                return Judgement(0.0, 0.0, f"output {index}: differs from the reference")
            continue
        if not torch.equal(mine.isnan(), right.isnan()):
            return Judgement(0.0, 0.0, f"output {index}: NaN in the wrong places")
        if not mine.numel():
            continue
        right = right.double().nan_to_num()
        luck = FLOOR[mine.dtype] * max(1.0, float(right.abs().max()))
        error, plain_error = (
            float((t.double().nan_to_num() - right).abs().max()) for t in (mine, torchs)
        )
        allowed = times * plain_error + luck
        if not error <= allowed:
            return Judgement(error, allowed, f"output {index}: error {error:.2g} > {allowed:.2g}")
        if error >= worst.error:
            worst = Judgement(error, allowed)
    return worst


def judge_case(
    case: OpCase, dtype: torch.dtype, backend: str, device: str | torch.device = "cpu"
) -> Judgement:
    """One case on one backend; fp64 is computed on the CPU. Fresh outputs hold NaN."""
    inputs = case.inputs(dtype, device)
    exact = outputs(case.op, widened(case.op, case.inputs(dtype)), "reference")
    plain = outputs(case.op, inputs, "reference")
    with poisoned():
        got = outputs(case.op, case.prepare(inputs, backend), backend)
    return judge(got, plain, exact)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch fills fresh memory with NaN, so that an element left unwritten shows."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    strict = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            # What is not deterministic on a GPU is not the question here.
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def _copy(tensor: Tensor) -> Tensor:
    copy = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return copy.copy_(tensor)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
