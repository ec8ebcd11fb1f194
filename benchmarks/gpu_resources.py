"""What every Triton kernel takes of the GPUs it is compiled for, none of which need be there.

    python -m benchmarks.gpu_resources [--targets 80,89,90,100,120] [--markdown FILE]

Collects the launches that the backends make on problems of real sizes, compiles each different
kernel, and prints registers, shared memory, stack and the matrix instruction. The exit status is 1
where a kernel spills, takes more shared memory than the target has, or lacks tensor cores where it
should use them.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from multiprocessing import get_context
from pathlib import Path

import torch

import fssa_kernels
from benchmarks.gpu_suite.problems import (
    AttentionProblem,
    ExpandProblem,
    LinearProblem,
    NormProblem,
    Problem,
    RopeProblem,
    SampleProblem,
    TakeProblem,
)
from benchmarks.gpu_suite.shapes import MODELS, row_width
from fssa_kernels import explain
from fssa_kernels.gpu.backend import is_interpreting
from fssa_kernels.gpu.device import KNOWN
from fssa_kernels.gpu.launch import Launch, collecting
from fssa_kernels.gpu.resources import Resources, Specialisation, compile_for, distinct
from fssa_kernels.ops.modulated_linear.triton_bwd import modulated_linear_bwd_triton
from fssa_kernels.ops.residual_film_rms_norm.triton_bwd import residual_film_rms_norm_bwd_triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Kernels whose products of half-precision matrices belong on the tensor cores, and the families
# for which they have none: where every row has a B of its own, and where nothing is modulated.
TENSOR_CORE: dict[str, tuple[str, ...]] = {
    "modulated_linear_kernel": (),
    "shrink_kernel": (),
    "expand_kernel": ("factors", "none"),
    "norm_shrink_kernel": (),
    "paged_attention_kernel": (),
}
# Of one target, unless there are more tiles and families.
MOST_KERNELS = 120
_HALF = ("*bf16", "*fp16")


@dataclass(frozen=True)
class Compiled:
    """One kernel on one target, or why it could not be compiled.

    `tensor_core` says whether it should use tensor cores.
    """

    kernel: str
    configuration: str
    target: int
    tensor_core: bool
    resources: Resources | None
    error: str = ""

    def faults(self) -> list[str]:
        """What is wrong with it."""
        if self.resources is None:
            return [f"does not compile: {self.error}"]
        found = []
        if self.resources.stack_bytes:
            found.append(f"spills: {self.resources.stack_bytes} bytes of stack")
        limit = KNOWN[self.target].shared_bytes
        if self.resources.shared_bytes > limit:
            found.append(f"takes {self.resources.shared_bytes} of {limit} bytes of shared memory")
        if self.tensor_core and not self.resources.tensor_core:
            found.append("uses no tensor cores")
        return found

    def cells(self) -> tuple[str, ...]:
        taken = self.resources
        figures = (
            ("", "", "", "")
            if taken is None
            else (
                str(taken.registers),
                str(taken.shared_bytes),
                str(taken.stack_bytes),
                taken.tensor_core or "none",
            )
        )
        return (self.kernel, self.configuration, f"sm_{self.target}", *figures)


def main(arguments: list[str] | None = None) -> int:
    """The command; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default="80,90,100", help="compute capabilities")
    parser.add_argument("--markdown", type=Path, help="write the table there as well")
    parser.add_argument("--most", type=int, default=MOST_KERNELS, help="kernels of one target")
    options = parser.parse_args(arguments)
    targets = [int(target) for target in options.targets.split(",")]
    unknown = [target for target in targets if target not in KNOWN]
    if unknown:
        parser.error(f"--targets: expected some of {sorted(KNOWN)}, got {unknown}")
    if is_interpreting():
        parser.error("kernels cannot be compiled under TRITON_INTERPRET")
    futures, thinned = [], 0
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for target in targets:
            specials = distinct(launches(target))
            kept = thin(specials, options.most)
            thinned += len(specials) - len(kept)
            futures += [pool.submit(_compile_sent, *_sent(one), target) for one in kept]
        compiled = [future.result() for future in futures]
    return report(compiled, thinned, options.markdown)


def report(compiled: Sequence[Compiled], thinned: int, markdown: Path | None = None) -> int:
    """Print the table, the totals and what is wrong; the exit status."""
    header = ("kernel", "configuration", "target", "registers", "shared", "stack", "tensor cores")
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(one.cells()) + " |" for one in compiled]
    lines += ["", totals(compiled, thinned)]
    print("\n".join(lines))
    if markdown is not None:
        markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    faulty = [(one, fault) for one in compiled for fault in one.faults()]
    for one, fault in faulty:
        where = f"{one.kernel} {one.configuration} sm_{one.target}"
        print(f"{where}: {fault}", file=sys.stderr)
    return int(bool(faulty))


def totals(compiled: Sequence[Compiled], thinned: int) -> str:
    """One line about all of them."""
    there = [one.resources for one in compiled if one.resources is not None]
    return (
        f"{len(compiled)} kernels compiled, {thinned} more left out that share tile and family "
        f"with one of these; most registers {max((r.registers for r in there), default=0)}"
        f", most shared memory {max((r.shared_bytes for r in there), default=0)} bytes, "
        f"{sum(r.stack_bytes > 0 for r in there)} spill, "
        f"{sum(bool(one.faults()) for one in compiled)} at fault"
    )


def problems() -> Iterator[Problem]:
    """Sizes of real models: what serving meets, small batches and long prefills."""
    for name in ("llama-8b", "qwen2.5-1.5b"):
        model = MODELS[name]
        for linear in model.linears.values():
            for tokens in (1, 16, 33, 128, 2048, 8192):
                yield LinearProblem(linear, tokens)
                for family in ("static", "gated", "core", "factors"):
                    for rank in (8, 16, 32, 64):
                        yield LinearProblem(linear, tokens, family, rank, min(tokens, 32))
    for model in (MODELS[name] for name in ("llama-8b", "llama-1b", "qwen2.5-7b")):
        heads = (model.num_heads, model.num_kv_heads, model.head_dim)
        for batch, queries, context in ((1, 1, 512), (32, 1, 4096), (4, 64, 512), (1, 2048, 2048)):
            yield AttentionProblem(batch, queries, context, *heads)
            yield AttentionProblem(batch, queries, context, *heads, window=1024)
        for tokens in (1, 128, 2048):
            yield NormProblem(tokens, model.hidden)
            yield NormProblem(tokens, model.hidden, film=True)
            yield NormProblem(tokens, model.hidden, film=True, low_rank=16)
            for rank in (8, 16, 64):
                yield NormProblem(tokens, model.hidden, low_rank=3 * rank)
            yield RopeProblem(tokens, *heads)
            yield RopeProblem(tokens, *heads, norm=True)
            yield TakeProblem(model.vocab_size, model.hidden, tokens)
        for batch in (1, 128):
            yield SampleProblem(batch, model.vocab_size, "filtered")
        for latents in (1, 64):
            yield ExpandProblem(latents, 16, row_width(model, 16))


def run_gradients() -> None:
    """What training launches, on sizes of a real model."""
    shape = MODELS["llama-8b"].linears["qkv"]
    tokens, users, hidden = 128, 32, shape.in_features
    for dtype in DTYPES:
        for family in ("static", "gated", "core"):
            for rank in (8, 16, 64):
                inputs = LinearProblem(shape, tokens, family, rank, users).inputs("meta", dtype)
                dy = inputs["x"].new_empty(tokens, shape.num_columns)
                named = (inputs[name] for name in ("x", "weight", "lora_a", "lora_b"))
                rows, slots = inputs.get("rows"), inputs["slots"]
                needs = [True, False, False, True, True, rows is not None]
                modulated_linear_bwd_triton(
                    dy, *named, rows, slots, family, inputs["splits"], needs
                )
        x = torch.empty(tokens, hidden, dtype=dtype, device="meta")
        film = x.new_empty(users, 2, hidden)
        slots = torch.empty(tokens, dtype=torch.int32, device="meta")
        for residual, rows in ((None, None), (x, film)):
            residual_film_rms_norm_bwd_triton(
                x,
                x,
                x,
                residual,
                residual,
                x[0],
                rows,
                slots,
                1e-5,
                0.0,
                [True, False, rows is not None],
            )


def launches(target: int) -> list[Launch]:
    """What the Triton backends would launch on these problems, on a GPU of that capability."""
    with collecting(KNOWN[target]) as collected, torch.no_grad():
        for problem in problems():
            for dtype in DTYPES:
                inputs = problem.inputs("meta", dtype)
                verdicts = explain(problem.op, **inputs)
                if any(v.backend == "triton" and v.can for v in verdicts):
                    getattr(fssa_kernels, problem.op)(**inputs, backend="triton")
        run_gradients()
    return collected


def thin(specials: Sequence[Specialisation], most: int) -> list[Specialisation]:
    """At most about `most` of them, the same ones every time, in their order.

    Every tile configuration stays at least once with every family it is used with; variants (of
    types, alignment, epilogue, splits) are added as long as there is room.
    """
    groups: dict[object, list[Specialisation]] = {}
    for special in specials:
        groups.setdefault(_tile_and_family(special), []).append(special)
    # Groups begin with another type each, so that none is only ever compiled in one.
    turned = [
        [*group[index % len(group) :], *group[: index % len(group)]]
        for index, group in enumerate(groups.values())
    ]
    by_turn = chain.from_iterable(zip_longest(*turned))
    kept = set([one for one in by_turn if one is not None][: max(most, len(groups))])
    return [special for special in specials if special in kept]


def _tile_and_family(special: Specialisation) -> object:
    constants = dict(special.constants)
    blocks = tuple((name, v) for name, v in special.constants if name.startswith("BLOCK"))
    # Where no constant names the family, it shows in which tensors there are.
    absent = tuple(name for name, value in special.constants if value is None)
    family = constants.get("FAMILY", absent)
    return special.name, blocks, special.num_warps, special.num_stages, family


def compile_one(special: Specialisation, target: int) -> Compiled:
    """One kernel for one target."""
    half = any(kind in _HALF for _, kind in special.signature)
    without = TENSOR_CORE.get(special.name)
    wanted = half and without is not None and dict(special.constants).get("FAMILY") not in without
    about = (special.name, special.describe(), target, wanted)
    try:
        return Compiled(*about, compile_for(special, target))
    except Exception as error:
        return Compiled(*about, None, " ".join(str(error).split())[:200])


def _sent(special: Specialisation) -> tuple[str, str, Specialisation]:
    """What another process can be sent: a kernel goes by its name."""
    function = special.kernel.fn
    return function.__module__, function.__name__, replace(special, kernel=None)


def _compile_sent(module: str, name: str, special: Specialisation, target: int) -> Compiled:
    kernel = getattr(importlib.import_module(module), name)
    return compile_one(replace(special, kernel=kernel), target)


if __name__ == "__main__":
    sys.exit(main())
