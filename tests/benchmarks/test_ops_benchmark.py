"""``pytest benchmarks``: every op and backend there is gets a case, and a wrong result no time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import test_ops as ops_benchmark
from benchmarks.gate import Judgement
from fssa_kernels.native import NATIVE
from fssa_kernels.testing import OPS

ROOT = Path(__file__).parents[2]


class Benchmark:
    """As much of pytest-benchmark's fixture as the cases use; runs what it is given once."""

    group = ""
    timed = 0

    def pedantic(self, function: Any, *, rounds: int, iterations: int, warmup_rounds: int) -> None:
        assert min(rounds, iterations, warmup_rounds) > 0
        function()
        self.timed += 1


PARAMETERS = list(ops_benchmark.parameters())
FIRST: dict[tuple[str, str], Any] = {}
for parameter in PARAMETERS:
    case, dtype, backend = parameter.values
    FIRST.setdefault((case.op, backend), parameter)


def test_every_op_has_cases_for_every_backend_in_both_dtypes() -> None:
    assert {op for op, _ in FIRST} == set(OPS)
    assert {p.values[1] for p in PARAMETERS} == set(ops_benchmark.DTYPES)
    for op in OPS:
        backends = {backend for of, backend in FIRST if of == op}
        assert "reference" in backends
        assert (NATIVE is not None and op != "expand_modulation") == ("native" in backends)
    names = [parameter.id for parameter in PARAMETERS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("case", "dtype", "backend"), FIRST.values())
def test_a_case_is_timed(case: Any, dtype: torch.dtype, backend: str) -> None:
    benchmark = Benchmark()
    ops_benchmark.test_op(benchmark, case, dtype, backend)
    assert benchmark.timed == 1
    assert benchmark.group == f"{case} {str(dtype)[6:]}"


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case, dtype, backend = next(iter(FIRST.values())).values
    monkeypatch.setattr(ops_benchmark, "judge_case", lambda *_: Judgement(2.0, 1.0, "too far off"))
    benchmark = Benchmark()
    with pytest.raises(AssertionError, match="too far off"):
        ops_benchmark.test_op(benchmark, case, dtype, backend)
    assert not benchmark.timed


def test_the_command_of_the_documentation() -> None:
    """As it is written down, settings of the tests included; one case is enough."""
    assert "`pytest benchmarks --benchmark-only`" in (ROOT / "benchmarks/README.md").read_text()
    case = "take_rows and float32 and reference and one"
    # As if it were run by itself, whoever runs this one.
    environment = {n: value for n, value in os.environ.items() if not n.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-k", case],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "benchmark 'take_rows" in done.stdout
