"""Kernels compiled ahead of time for a GPU that need not be there, and what they take of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fssa_kernels.gpu.launch import Launch, options

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    `registers` and `stack_bytes` are per thread; registers that do not fit spill to the stack.
    `tensor_core` is the matrix instruction in it: "tcgen05", "wgmma", "mma" or "".
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_core: str


@dataclass(frozen=True)
class Specialisation:
    """A launch as the compiler sees it: types, constants and alignment, not values."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def describe(self) -> str:
        """The constants that a person would call the configuration."""
        declared = {p.name for p in self.kernel.params if p.is_constexpr}
        parts = [f"{name}={value}" for name, value in self.constants if name in declared]
        types = sorted({ty for _, ty in self.signature if ty.startswith("*")})
        return " ".join([*parts, f"warps={self.num_warps}", f"stages={self.num_stages}", *types])


def specialise(launch: Launch) -> Specialisation:
    """What Triton would compile for a launch: alignment of 16 and ones are known to it."""
    signature, constants, aligned = [], [], []
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        if (
            parameter.is_constexpr
            or value is None
            or (special and type(value) is int and value == 1)
        ):
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
            continue
        signature.append((parameter.name, _type_of(value)))
        # Memory of torch starts aligned; a view into it is as aligned as its offset.
        offset = (
            value.storage_offset() * value.element_size() if isinstance(value, Tensor) else value
        )
        if not isinstance(value, float) and offset % 16 == 0:
            aligned.append(index)
    return Specialisation(
        launch.kernel,
        tuple(signature),
        tuple(constants),
        tuple(aligned),
        launch.num_warps,
        launch.num_stages,
    )


def distinct(launches: Iterable[Launch]) -> list[Specialisation]:
    """Every different kernel that these launches need, in order of appearance."""
    return list(dict.fromkeys(specialise(launch) for launch in launches))


def compile_for(special: Specialisation, capability: int) -> Resources:
    """Compile for sm_<capability> and read back what the binary takes."""
    source = ASTSource(
        special.kernel,
        dict(special.signature),
        dict(special.constants),
        {(index,): _ALIGNED for index in special.aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options=options(special.num_warps, special.num_stages),
    )
    ptx = compiled.asm["ptx"]
    found = [name for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if name in ptx]
    usage = _usage(compiled.asm["cubin"])
    return Resources(
        usage["REG"], usage["STACK"], compiled.metadata.shared, (found or [""])[0].split(".")[0]
    )


def _usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed)}


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
