"""The Triton backend of an op: found without importing triton, imported at its first use.

Kernels run on a GPU, or on the CPU in Triton's interpreter (``TRITON_INTERPRET=1``, for tests).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fssa_kernels.dispatch import Backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED = "Triton's interpreter is for tests: it runs a kernel's programs one after another"


def triton_backend(module: str, run: str) -> Backend:
    """The backend that function `run` of `module` is; its `cannot_triton` says what it refuses.

    `module` is not imported before a tensor lies where its kernels can run.
    """

    def call(*inputs: Any) -> Any:
        return getattr(_module(module), run)(*inputs)

    def cannot(*inputs: Any) -> str | None:
        reason = _unavailable(inputs[0])
        if reason is not None:
            return reason
        return _module(module).cannot_triton(*inputs)

    def avoid(*inputs: Any) -> str | None:
        if inputs[0].device.type == "cpu":
            return _INTERPRETED
        prefers = getattr(_module(module), "avoid_triton", None)
        return None if prefers is None else prefers(*inputs)

    return Backend("triton", call, cannot, avoid)


def unsupported(**tensors: Tensor | None) -> str | None:
    """Why the kernels cannot read one of these tensors, or None.

    They take float32, bfloat16 and float16, any strides but that of the last dimension, which is 1.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            return f"{name} is packed for the native CPU kernels"
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, the kernel takes float32, bfloat16 and float16"
        if tensor.dim() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and tensor.numel():
            return f"the last dimension of {name} is not contiguous (strides {tensor.stride()})"
    return None


def _module(name: str) -> ModuleType:
    return sys.modules.get(name) or importlib.import_module(name)


def _unavailable(tensor: Any) -> str | None:
    """Why no Triton kernel can run where this tensor lies, or None."""
    if not isinstance(tensor, Tensor):
        return "it is packed for the native CPU kernels"
    where = tensor.device.type
    if where not in ("cuda", "cpu", "meta"):
        return f"the kernels run on NVIDIA GPUs, not on {tensor.device}"
    if where == "cpu" and not is_interpreting():
        return "the tensors are on the CPU, the kernels run on a GPU"
    if not _installed():
        return "triton is not installed (pip install 'fssa[gpu]')"
    if where == "meta" and not _collecting():
        return "the tensors are on meta, which has no memory"
    return None


@functools.cache
def _installed() -> bool:
    """Asked once: looking for a package that is not there costs a search of the path."""
    return importlib.util.find_spec("triton") is not None


def is_interpreting() -> bool:
    # Triton reads the variable when it decorates a kernel; so it must be set from the start.
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _collecting() -> bool:
    launch = sys.modules.get("fssa_kernels.gpu.launch")
    return launch is not None and launch.is_collecting()
