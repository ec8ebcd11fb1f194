"""Every op on every backend there is, fused beside reference.

    pytest benchmarks --benchmark-only

Results are grouped by case and dtype, so that a ratio reads off each small table. A case is timed
only if its result passed the comparison with the fp64 reference in the same run: an error of at
most twice the reference's own at that dtype. The cases are the tests' (small and awkward) and the
linears, norms and attention of a decode step of a 135M model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fssa_kernels import explain
from fssa_kernels.ops.modulated_linear.cases import SHAPES_135M
from fssa_kernels.testing import OPS, Inputs, OpCase, cases

DTYPES = (torch.float32, torch.bfloat16)


def parameters() -> Iterator[Any]:
    """(case, dtype, backend) for every backend that can serve the case."""
    for op in OPS:
        for case in [*cases(op), *(SHAPES_135M if op == "modulated_linear" else ())]:
            for dtype in DTYPES:
                for verdict in explain(op, **case.inputs(dtype)):
                    if verdict.can:
                        name = f"{case}-{str(dtype)[6:]}-{verdict.backend}"
                        yield pytest.param(case, dtype, verdict.backend, id=name)


@pytest.mark.parametrize(("case", "dtype", "backend"), parameters())
def test_op(benchmark: Any, case: OpCase, dtype: torch.dtype, backend: str) -> None:
    benchmark.group = f"{case} {str(dtype)[6:]}"
    inputs = case.inputs(dtype)
    prepared = case.prepare(inputs, backend)
    with torch.inference_mode():
        gate(case, inputs, dtype, case.run(prepared, backend))
        benchmark.pedantic(
            lambda: case.run(prepared, backend), rounds=15, iterations=5, warmup_rounds=2
        )


def gate(case: OpCase, inputs: Inputs, dtype: torch.dtype, result: Any) -> None:
    """Fail unless the result is as good as the reference at the same dtype."""
    if case.op == "sample":  # chooses; nothing to round
        expected = case.run(inputs, "reference")
        assert torch.equal(result[0], expected[0])
        return
    wide = {
        name: value.double() if _is_float(value) and name != "cos_sin" else value
        for name, value in inputs.items()
    }
    exact = _tensors(case.run(wide, "reference"))
    plain = _tensors(case.run(case.inputs(dtype), "reference"))
    for got, reference, best in zip(_tensors(result), plain, exact, strict=True):
        if got.numel():
            error, allowed = _error(got, best), _error(reference, best)
            assert error <= 2 * allowed + case.tolerance(dtype)["atol"]


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).abs().max())
