"""Modulated linears of real models beside the vendor's product and what others do.

A contest is one linear at one M and R; its sides are named "<kind> <users>". The plan begins with
what the targets ask for and goes on to the full sweep for as long as there is time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gate import Judgement, judge, poisoned
from benchmarks.gpu_suite.correctness import faulty_key
from benchmarks.gpu_suite.multi_lora import base_linear, group, multi_lora_linear
from benchmarks.gpu_suite.problems import LinearProblem, few_rows
from benchmarks.gpu_suite.scale import Scale
from benchmarks.gpu_suite.shapes import MODELS
from benchmarks.gpu_suite.suite import Side, Suite
from benchmarks.gpu_suite.workers import spread
from fssa_kernels import explain, modulated_linear
from fssa_kernels.ops.modulated_linear.reference import modulated_linear_ref
from fssa_kernels.testing import Inputs

BASE = "cublas"
FAMILIES = ("none", "static", "gated", "core", "factors")
# Serving engines round u to 16 bits and the result once more, which is theirs to choose.
_PEER_ERROR = 4.0


@dataclass(frozen=True)
class Plan:
    """One contest: where, and which sides."""

    model: str
    linear: str
    num_tokens: int
    rank: int
    sides: tuple[str, ...]

    @property
    def key(self) -> dict[str, Any]:
        return {"model": self.model, "linear": self.linear, "M": self.num_tokens, "R": self.rank}


def telling(scale: Scale) -> Iterator[Plan]:
    """What the targets ask for: the first model, the first ranks."""
    model, rank = scale.models[0], scale.ranks[0]
    for num_tokens in scale.tokens:
        yield from _linears(scale, model, num_tokens, rank, _core(scale, num_tokens))
    top = max((m for m in scale.tokens if m <= 128), default=1)
    for num_tokens in dict.fromkeys((top, scale.tokens[0])):
        yield from _linears(scale, model, num_tokens, scale.ranks[1], _core(scale, num_tokens))
    for num_tokens in dict.fromkeys((scale.compiled_tokens[-1], *scale.compiled_tokens)):
        users = min(scale.users, num_tokens)
        sides = (
            *(f"static {users}", f"core {num_tokens}"),
            *(f"factors {users}", f"multi-lora {users}", f"gated {num_tokens}"),
            *(f"eager {num_tokens}", f"compiled {num_tokens}"),
        )
        yield from _linears(scale, model, num_tokens, rank, sides)


def sweep(scale: Scale) -> Iterator[Plan]:
    """Every model, rank and M that is not among the telling ones."""
    done = {(p.model, p.linear, p.num_tokens, p.rank) for p in telling(scale)}
    for rank in scale.ranks:
        for model in scale.models:
            for num_tokens in (*scale.tokens, *scale.more_tokens):
                some = min(scale.users, num_tokens)
                sides = ("none 0", "gated 1", f"gated {num_tokens}", f"core {some}", "static 1")
                sides += (f"factors {some}", f"multi-lora {some}")
                for plan in _linears(scale, model, num_tokens, rank, sides):
                    if (plan.model, plan.linear, plan.num_tokens, plan.rank) not in done:
                        yield plan


def measure(suite: Suite, part: str, plans: Iterator[Plan]) -> None:
    """Run the plans of a part."""
    suite.run(part, ((plan.key, lambda plan=plan: _contest(suite, part, plan)) for plan in plans))


def warm_up(suite: Suite) -> None:
    """Compile what the telling contests need, in many processes at once; nothing is timed.

    Triton and torch.compile leave what they compiled on the disk, where the measuring process finds
    it.
    """
    plans = list(telling(suite.scale))
    pieces = [(plan, suite.device, suite.scale.compiler) for plan in plans]
    if not suite.scale.workers:
        pieces = pieces[:1]
    done = spread(compile_plan, pieces, suite.scale.workers, suite.deadline)
    failed = [why for _, _, why in done if why]
    key = {"plans": len(pieces), "not compiled": len(failed)}
    suite.records.append({"part": "warm-up", "key": key, "status": "ok", "sides": {}})


def compile_plan(piece: tuple[Plan, str, str]) -> None:
    """Run every side of a plan once; one that fails will say so when it is measured."""
    plan, device, compiler = piece
    problem = LinearProblem(MODELS[plan.model].linears[plan.linear], plan.num_tokens)
    with torch.no_grad():
        base = problem.base(device, torch.bfloat16)
        for name in plan.sides:
            kind, users = name.split()
            with contextlib.suppress(Exception):
                side = _side(device, compiler, problem, [base], kind, int(users), plan.rank)
                side.call(0)


def _core(scale: Scale, num_tokens: int) -> tuple[str, ...]:
    counts = [n for n in (1, scale.users, num_tokens) if n <= num_tokens]
    gated = [f"gated {n}" for n in counts]
    peers = [f"multi-lora {n}" for n in counts if n <= scale.most_factors]
    cuda = [f"cuda {n}" for n in counts if num_tokens <= scale.cuda_tokens]
    return ("none 0", *dict.fromkeys(gated + cuda + peers), f"eager {num_tokens}")


def _linears(
    scale: Scale, model: str, num_tokens: int, rank: int, sides: tuple[str, ...]
) -> Iterator[Plan]:
    for linear in scale.linears:
        yield Plan(model, linear, num_tokens, rank, tuple(dict.fromkeys(sides)))


def _contest(suite: Suite, part: str, plan: Plan) -> None:
    shape = MODELS[plan.model].linears[plan.linear]
    problem = LinearProblem(shape, plan.num_tokens)
    copies = suite.scale.copies(problem.weight_bytes)
    bases = [problem.base(suite.device, torch.bfloat16, seed) for seed in range(copies)]

    def side(name: str) -> Callable[[], Side]:
        kind, users = name.split()
        device, compiler = suite.device, suite.scale.compiler
        return lambda: _side(device, compiler, problem, bases, kind, int(users), plan.rank)

    makers = {BASE: lambda: _base(problem, bases), **{name: side(name) for name in plan.sides}}
    suite.contest(part, plan.key, makers, base=BASE, copies=copies)


def _base(problem: LinearProblem, bases: list[Inputs]) -> Side:
    return Side(
        lambda i: base_linear(bases[i]),
        problem.work(),
        lambda: check_rows(lambda: base_linear(bases[0]), bases[0], times=_PEER_ERROR),
    )


def _side(
    device: str,
    compiler: str,
    problem: LinearProblem,
    bases: list[Inputs],
    kind: str,
    users: int,
    rank: int,
) -> Side:
    family = "factors" if kind == "multi-lora" else kind
    family = "gated" if kind in ("eager", "compiled", "cuda") else family
    problem = replace(problem, family=family, rank=rank, num_users=users)
    copies = [
        {**base, **problem.term(device, torch.bfloat16, seed)} for seed, base in enumerate(bases)
    ]
    work, first = problem.work(), copies[0]
    if kind == "multi-lora":
        splits = first["splits"] or [len(first["weight"])]
        groups = [group(inputs["slots"], splits) for inputs in copies]

        def peer(i: int) -> torch.Tensor:
            return multi_lora_linear(copies[i], groups[i])

        return Side(peer, work, lambda: check_rows(lambda: peer(0), first, times=_PEER_ERROR))
    if kind == "eager":
        return Side(lambda i: modulated_linear(**copies[i], backend="reference"), work)
    if kind == "compiled":
        run = _compiled(compiler)
        return Side(
            lambda i: run(copies[i]),
            work,
            lambda: check_rows(lambda: run(first), first, times=_PEER_ERROR),
        )
    backend = "cuda" if kind == "cuda" else "triton"
    verdict = next(v for v in explain("modulated_linear", **first) if v.backend == backend)
    if not verdict.can:
        raise RuntimeError(f"{backend} {verdict.reason}")

    def ours(i: int) -> torch.Tensor:
        return modulated_linear(**copies[i], backend=backend)

    ops = (faulty_key("modulated_linear", backend),)
    return Side(ours, work, lambda: check_rows(lambda: ours(0), first), ops=ops)


def check_rows(run: Callable[[], torch.Tensor], inputs: Inputs, times: float = 2.0) -> Judgement:
    """Judge some rows of a result: fp64 of a whole prefill would take longer than the suite."""
    index, few = few_rows(inputs)
    wide = {
        name: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for name, t in few.items()
    }
    exact = modulated_linear(**wide, backend="reference")
    plain = modulated_linear(**few, backend="reference")
    with poisoned():
        got = run()[index]
    return judge([got], [plain], [exact], times=times)


def _compiled(backend: str) -> Callable[[Inputs], torch.Tensor]:
    torch._dynamo.reset()
    compiled = torch.compile(modulated_linear_ref, backend=backend, dynamic=False)
    names = ("x", "weight", "bias", "lora_a", "lora_b", "rows", "slots", "family")

    def run(inputs: Inputs) -> torch.Tensor:
        splits = inputs["splits"] or [len(inputs["weight"])]
        values = [inputs.get(name) for name in names]
        return compiled(*values, splits, inputs["epilogue"])

    return run
