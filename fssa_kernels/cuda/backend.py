"""The CUDA backend of an op, and what its kernels cannot read."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fssa_kernels.cuda.module import (
    architectures,
    device_of,
    is_compiled_for,
    is_emulating,
    missing,
)
from fssa_kernels.dispatch import Backend

HALF_DTYPES = (torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes of one access
NOT_MEASURED = "not measured on any GPU yet, so taken only where it is named"


def cuda_backend(module: str, run: str) -> Backend:
    """The backend that function `run` of `module` is; its `cannot_cuda` says what it refuses.

    `auto` passes it over until its speed has been measured.
    """

    def call(*inputs: Any) -> Any:
        return getattr(_module(module), run)(*inputs)

    def cannot(*inputs: Any) -> str | None:
        reason = _unavailable(inputs[0])
        if reason is not None:
            return reason
        return _module(module).cannot_cuda(*inputs)

    def avoid(*inputs: Any) -> str | None:
        return NOT_MEASURED

    return Backend("cuda", call, cannot, avoid)


def unsupported(
    half: dict[str, Tensor | None], other: dict[str, Tensor | None] | None = None
) -> str | None:
    """Why the kernels cannot read one of these tensors, or None.

    `half` are read 16 bytes at a time: all of the first one's 16-bit type, rows at multiples of 16
    bytes. `other` are read number by number, in that type or fp32 (or int32).
    """
    dtype = next(tensor.dtype for tensor in half.values() if isinstance(tensor, Tensor))
    for name, tensor in {**half, **(other or {})}.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            return f"{name} is packed for the native CPU kernels"
        if name in half:
            if tensor.dtype not in HALF_DTYPES:
                return f"{name} is {tensor.dtype}, the kernel takes bfloat16 and float16"
            if tensor.dtype != dtype:
                return f"{name} is {tensor.dtype}, the kernel takes it in {dtype}"
        elif tensor.is_floating_point() and tensor.dtype not in (dtype, torch.float32):
            return f"{name} is {tensor.dtype}, the kernel takes it in {dtype} or float32"
        if tensor.dim() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and tensor.numel():
            return f"the last dimension of {name} is not contiguous (strides {tensor.stride()})"
        if name in half and not is_aligned(tensor):
            return (
                f"rows of {name} are not at multiples of {ALIGNMENT} bytes (address "
                f"{tensor.data_ptr():#x}, strides {tensor.stride()})"
            )
    return None


def is_aligned(tensor: Tensor) -> bool:
    """Whether every row of a tensor begins at a multiple of 16 bytes."""
    if not tensor.numel():
        return True
    sizes, strides = tensor.shape[:-1], tensor.stride()[:-1]
    steps = [stride for size, stride in zip(sizes, strides, strict=True) if size > 1]
    width = ALIGNMENT // tensor.element_size()
    return tensor.data_ptr() % ALIGNMENT == 0 and all(step % width == 0 for step in steps)


def refusal(op: str, error: ValueError) -> str:
    """What the module's launch planning refused, without the op's name."""
    return str(error).removeprefix(f"{op}: ")


def _module(name: str) -> ModuleType:
    return sys.modules.get(name) or importlib.import_module(name)


def _unavailable(tensor: Any) -> str | None:
    """Why no CUDA kernel can run where this tensor lies, or None."""
    if not isinstance(tensor, Tensor):
        return "it is packed for the native CPU kernels"
    if is_emulating() and tensor.device.type == "cpu":
        return None
    if tensor.device.type != "cuda":
        return f"the kernels run on NVIDIA GPUs, not on {tensor.device}"
    if torch.version.cuda is None:
        return "this torch is not built for NVIDIA GPUs"
    reason = missing()
    if reason is not None:
        return reason
    device, compiled = device_of(tensor), architectures()
    if not is_compiled_for(device.capability, compiled):
        return (
            f"{tensor.device} is sm_{device.capability}, the kernels were compiled for "
            f"{', '.join(f'sm_{name}' for name in compiled)}"
        )
    return None
