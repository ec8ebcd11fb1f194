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

from benchmarks.gate import judge_case
from fssa_kernels import explain
from fssa_kernels.ops.modulated_linear.cases import SHAPES_135M
from fssa_kernels.testing import OPS, OpCase, cases

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
        judged = judge_case(case, dtype, backend)
        assert judged.good, judged.fault
        benchmark.pedantic(
            lambda: case.run(prepared, backend), rounds=15, iterations=5, warmup_rounds=2
        )
