"""The CUDA C++ kernels compiled without a GPU: what they take, and which instructions they became.

    python -m benchmarks.cuda_resources [--targets 80,90a,100] [--markdown FILE]

Every kernel of csrc/cuda is compiled for every target, with warnings as errors. Registers, stack
and spills are the compiler's own account, instructions are counted in the disassembly. A kernel
that spills, takes more registers than a block of its size has, or lacks an instruction it is meant
to have, fails the command. Without nvcc nothing is done, which is said, and the exit status is 0.

The second table is of launches: what the kernels take of shared memory, which is allotted when they
are launched, and how a device is filled. It needs the module (fssa_kernels._cuda), not a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.shapes import MODELS
from fssa_kernels.cuda.module import cuda_module, missing
from fssa_kernels.gpu.device import NOMINAL

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
TARGETS = ("80", "90a", "100")
REGISTERS = 65536  # of a multiprocessor
# Threads of a block at most, and blocks that are meant to fit beside each other.
BLOCKS = {
    "modulated_linear_kernel": (384, 1),
    "low_rank_kernel": (512, 1),
    "norm_kernel": (1024, 1),
    "norm_shrink_kernel": (256, 2),
    "paged_attention_kernel": (128, 2),
}
# What must stand in the disassembly, before sm_90 and from it on.
_ASYNC, _TILES = "LDGSTS.E.BYPASS.128", "UTMALDG.2D"
INSTRUCTIONS = {
    "modulated_linear_kernel": (
        ("HMMA.16816.F32", "LDS.128", _ASYNC),
        ("HMMA.16816.F32", "LDS.128", _TILES),
    ),
    "low_rank_kernel": (("LDG.E.128",), ("LDG.E.128",)),
    "norm_kernel": (("LDG.E.128", "STG.E.128"), ("LDG.E.128", "STG.E.128")),
    "norm_shrink_kernel": (("LDG.E.128", "HMMA"), ("LDG.E.128", "HMMA")),
    "paged_attention_kernel": ((_ASYNC, "HMMA", "LDSM"), (_ASYNC, "HMMA", "LDSM")),
}
SHOWN = (_ASYNC, _TILES, "LDG.E.128", "LDS.128", "LDSM", "HMMA")
NEVER = ("LDL", "STL")  # local memory
_KERNEL = re.compile(r"_ZN4fssa4cuda\d+([a-z_]+_kernel)I(.*?)EEvN")


@dataclass(frozen=True)
class Kernel:
    """One kernel on one target, as compiled.

    `template` is what tells it from its siblings; stack, stores and loads are of bytes spilled.
    """

    name: str
    template: str
    target: str
    registers: int
    stack: int
    spilled: int
    static_shared: int
    instructions: Counter[str]

    @property
    def runs(self) -> bool:
        """Whether this target is served by it: one way of copying is compiled to nothing."""
        if self.name != "modulated_linear_kernel":
            return True
        return self.template.endswith("tiles") == (generation(self.target) >= 90)

    def count(self, instruction: str) -> int:
        """How many there are of an instruction, whatever modifiers follow."""
        return sum(
            n
            for name, n in self.instructions.items()
            if name == instruction or name.startswith(instruction + ".")
        )

    def faults(self) -> list[str]:
        """What is wrong with it."""
        found = []
        threads, blocks = BLOCKS[self.name]
        if self.stack or self.spilled:
            found.append(f"{self.stack} bytes of stack, {self.spilled} spilled")
        if self.registers * threads * blocks > REGISTERS:
            found.append(
                f"{self.registers} registers, too many for {blocks} blocks of {threads} threads"
            )
        if self.static_shared:
            found.append(f"{self.static_shared} bytes of shared memory nobody planned")
        for instruction in INSTRUCTIONS[self.name][generation(self.target) >= 90]:
            if not self.count(instruction):
                found.append(f"has no {instruction}")
        found += [f"has {name}" for name in NEVER if self.count(name)]
        return found

    def cells(self) -> list[str]:
        figures = (self.registers, self.stack, self.spilled, *map(self.count, SHOWN))
        return [self.name, self.template, f"sm_{self.target}", *map(str, figures)]


def generation(target: str) -> int:
    return int(target.rstrip("af"))


def main(arguments: list[str] | None = None) -> int:
    """The command; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="architectures, as 80,90a")
    parser.add_argument("--markdown", type=Path, help="write the tables there as well")
    options = parser.parse_args(arguments)
    tools = {name: find_tool(name) for name in ("nvcc", "cuobjdump")}
    for name, path in tools.items():
        if path is None:
            print(f"not compiled: there is no {name} here")
            return 0
    assert tools["nvcc"] is not None
    targets = options.targets.split(",")
    jobs = [(source, target) for target in targets for source in sorted(SOURCES.glob("*.cu"))]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        results = list(pool.map(lambda job: compile_one(*job), jobs))
    kernels = sorted(
        (kernel for result in results if not isinstance(result, str) for kernel in result),
        key=lambda kernel: (kernel.name, kernel.template, generation(kernel.target)),
    )
    errors = [result for result in results if isinstance(result, str)]
    kernels = [kernel for kernel in kernels if kernel.runs]
    return report(kernels, errors, version_of(tools["nvcc"]), options.markdown)


def report(
    kernels: Sequence[Kernel],
    errors: Sequence[str],
    compiler: str = "",
    markdown: Path | None = None,
) -> int:
    """Print the tables and what is wrong; the exit status."""
    header = ["kernel", "for", "target", "registers", "stack", "spilled", *SHOWN]
    lines = [f"By `python -m benchmarks.cuda_resources`, {compiler}; nothing ran on a GPU.", ""]
    lines += [*table(header, [kernel.cells() for kernel in kernels]), "", totals(kernels), ""]
    reason = missing()
    if reason is None:
        lines += table(LAUNCH_HEADER, list(launches()))
    else:
        lines.append(f"Launches: {reason}")
    print("\n".join(lines))
    if markdown is not None:
        markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    faults = [
        f"{kernel.name} {kernel.template} sm_{kernel.target}: {fault}"
        for kernel in kernels
        for fault in kernel.faults()
    ]
    for line in [*errors, *faults]:
        print(line, file=sys.stderr)
    return int(bool(errors or faults))


def totals(kernels: Sequence[Kernel]) -> str:
    """One line about all of them."""
    return (
        f"{len(kernels)} kernels compiled, warnings as errors; most registers "
        f"{max((k.registers for k in kernels), default=0)}, "
        f"{sum(k.spilled > 0 or k.stack > 0 for k in kernels)} spill, "
        f"{sum(bool(k.faults()) for k in kernels)} at fault"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def find_tool(name: str) -> str | None:
    """A program of CUDA's: from CUDA_HOME, the path, CUDA's own folder, or the copy in triton."""
    folders = [Path(os.environ[v], "bin") for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    folders.append(Path("/usr/local/cuda/bin"))
    for folder in sys.path:
        folders.append(Path(folder, "triton", "backends", "nvidia", "bin"))
    found = shutil.which(name)
    return found or next((str(f / name) for f in folders if (f / name).exists()), None)


def version_of(nvcc: str) -> str:
    """ "nvcc 13.0.88"."""
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V([\d.]+)", printed)
    return f"nvcc {found[1] if found else 'of an unknown version'}"


def compile_one(source: Path, target: str) -> list[Kernel] | str:
    """The kernels of one file on one target, or what the compiler has to say."""
    nvcc, cuobjdump = find_tool("nvcc"), find_tool("cuobjdump")
    assert nvcc is not None
    assert cuobjdump is not None
    with tempfile.TemporaryDirectory() as folder:
        binary = str(Path(folder, "kernels.cubin"))
        code = ["-gencode", f"arch=compute_{target},code=sm_{target}", "-cubin", "-o", binary]
        strict = ["-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
        command = [nvcc, "-std=c++17", "-O3", *strict, *code, str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"{source.name} sm_{target} does not compile:\n{done.stdout}{done.stderr}"
        account = done.stdout + done.stderr
        listing = subprocess.run(
            [cuobjdump, "-sass", binary], capture_output=True, text=True, check=True
        ).stdout
    counts = count_instructions(listing)
    return [
        Kernel(*split_name(name), target, *figures, counts.get(name, Counter()))
        for name, figures in read_account(account)
    ]


def read_account(printed: str) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """(mangled name, (registers, stack, spilled, shared)) of every kernel in ptxas's words."""
    for part in re.split(r"Compiling entry function '", printed)[1:]:
        name = part[: part.index("'")]
        stack, stores, loads = (
            int(re.search(rf"(\d+) bytes {what}", part)[1])  # type: ignore[index]
            for what in ("stack frame", "spill stores", "spill loads")
        )
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert registers is not None
        yield (
            name,
            (int(registers[1]), stack, stores + loads, int(shared[1]) if shared else 0),
        )


def count_instructions(listing: str) -> dict[str, Counter[str]]:
    """How often each instruction stands in each function of a disassembly."""
    counts: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in listing.splitlines():
        function = re.match(r"\s*Function : (\S+)", line)
        if function is not None:
            current = counts.setdefault(function[1], Counter())
            continue
        code = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
        if code is not None:
            current[code[1]] += 1
    return counts


def split_name(mangled: str) -> tuple[str, str]:
    """("modulated_linear_kernel", "bf16, 16 rows, tiles") of a mangled name."""
    found = _KERNEL.match(mangled)
    assert found is not None, mangled
    name, arguments = found.groups()
    words = ["bf16" if "BF16" in arguments else "fp16"]
    numbers = re.findall(r"Li(\d+)E?", arguments)
    if name == "modulated_linear_kernel":
        words += [f"{8 * int(numbers[0])} rows", "tiles" if "Lb1" in arguments else "cp.async"]
    elif name == "paged_attention_kernel":
        words += [f"heads {numbers[0]} wide", f"{8 * int(numbers[1])} a group"]
    return name, ", ".join(words)


LAUNCH_HEADER = (
    "kernel",
    "problem",
    "device",
    "blocks",
    "threads",
    "shared bytes",
    "in flight",
    "rows of W and A",
)


def launches() -> Iterator[list[str]]:
    """How the kernels are launched for a Llama-8B at a few batches."""
    module: Any = cuda_module()
    model = MODELS["llama-8b"]
    for facts in NOMINAL.values():
        device = module.DeviceLimits(facts.capability, facts.num_sms, facts.shared_bytes)
        for name, shape in model.linears.items():
            for tokens, rank in ((1, 16), (16, 16), (32, 64)):
                plan = module.modulated_linear_plan(
                    device=device,
                    num_tokens=tokens,
                    in_features=shape.in_features,
                    splits=list(shape.splits),
                    paired=shape.epilogue != "none",
                    family=2,
                    rank=rank,
                )
                copied = plan.block_columns + plan.low_rows
                ahead = (plan.stages - 1) * 256 * (copied + tokens)
                yield [
                    "modulated_linear",
                    f"{name}, M={tokens}, gated R={rank}",
                    facts.name,
                    str(plan.grid),
                    str(plan.threads),
                    str(plan.shared_bytes),
                    str(ahead),
                    f"{plan.block_columns} + {plan.low_rows}",
                ]
        for batch, context in ((1, 512), (32, 4096)):
            attention = module.paged_attention_plan(
                device=device,
                num_tokens=batch,
                num_heads=model.num_heads,
                num_kv_heads=model.num_kv_heads,
                head_dim=model.head_dim,
                max_keys=context,
            )
            yield [
                "paged_attention",
                f"B={batch}, {context} keys",
                facts.name,
                str(batch * model.num_kv_heads * attention.num_parts),
                str(attention.threads),
                str(attention.shared_bytes),
                str(2 * 128 * 2 * model.head_dim),
                "",
            ]


if __name__ == "__main__":
    sys.exit(main())
