"""Every case of every op on every backend that can serve it, against fp64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.gate import judge_case
from benchmarks.gpu_suite.suite import OUT_OF_TIME, Suite
from benchmarks.gpu_suite.workers import spread
from fssa_kernels import explain
from fssa_kernels.testing import OPS, OpCase, cases


@dataclass(frozen=True)
class Piece:
    """A case by its name, for another process to find."""

    op: str
    case: str
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        return f"{self.op}-{self.case}-{str(self.dtype)[6:]}"


def measure(suite: Suite) -> None:
    """Record every verdict, and in `suite.wrong` the ops that may not be timed."""
    scale = suite.scale
    pieces = [
        Piece(op, case.name, dtype, suite.device)
        for dtype in scale.dtypes
        for op in OPS
        for case in cases(op)[: scale.cases_per_op]
    ]
    counts: dict[str, dict[str, int]] = {op: {} for op in OPS}
    faults, left_out = [], []
    for index, verdicts, why in spread(check, pieces, scale.workers, suite.deadline):
        piece = pieces[index]
        if why == OUT_OF_TIME:
            left_out.append(str(piece))
            continue
        for backend, fault in verdicts.items() if not why else [("any", why)]:
            counts[piece.op][backend] = counts[piece.op].get(backend, 0) + 1
            if fault:
                faults.append({"case": str(piece), "backend": backend, "fault": fault})
                # What is wrong in a dtype that nothing here is timed in is wrong all the same.
                if backend != "reference":
                    key = faulty_key(piece.op, backend)
                    suite.wrong.setdefault(key, []).append(f"{piece} {backend}: {fault}")
    suite.records.append(
        {
            "part": "correctness",
            "key": {"cases": len(pieces)},
            "checked": counts,
            "faults": faults,
            "left_out": len(left_out),
            "status": f"{OUT_OF_TIME}: {len(left_out)} of the cases" if left_out else "ok",
            "sides": {},
        }
    )


def faulty_key(op: str, backend: str) -> str:
    """What `suite.wrong` calls an op: a fault of the CUDA C++ kernels is not Triton's."""
    return f"{op} cuda" if backend == "cuda" else op


def check(piece: Piece) -> dict[str, str]:
    """What is wrong, "" for nothing, by backend that can serve the case."""
    case = _find(piece)
    faults = {}
    with torch.no_grad():
        for verdict in explain(case.op, **case.inputs(piece.dtype, piece.device)):
            if verdict.can:
                judged = judge_case(case, piece.dtype, verdict.backend, piece.device)
                faults[verdict.backend] = judged.fault
    return faults


def _find(piece: Piece) -> OpCase:
    return next(case for case in cases(piece.op) if case.name == piece.case)
