"""Loading of the CUDA module, and the codes it shares with csrc/cuda.

The module is optional: without nvcc the package installs without it. It loads where there is no
GPU, too, and then says which architectures it was compiled for. Tests put another in its place,
which runs the same kernels on a CPU (csrc/cuda/emulation.h).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fssa_kernels.gpu.device import Device, device_facts

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in layout.h


class _Emulated:
    """The module and the device that stand in for the real ones, if any do."""

    module: ModuleType | None = None
    device: Device | None = None


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("fssa_kernels._cuda"), ""
    except ModuleNotFoundError:
        return None, "fssa_kernels._cuda was not built (no nvcc at installation)"
    except ImportError as error:
        return None, f"fssa_kernels._cuda is built but does not load: {error}"


def cuda_module() -> ModuleType | None:
    """The module whose kernels serve, or None."""
    return _Emulated.module or _load()[0]


def missing() -> str | None:
    """Why there is no module, or None."""
    return None if cuda_module() is not None else _load()[1]


def architectures() -> list[str]:
    """What the module was compiled for ("80", "90a", "100"), nothing without a module."""
    module = cuda_module()
    return [] if module is None else list(module.architectures)


def is_compiled_for(capability: int, compiled: list[str]) -> bool:
    """Whether machine code of one of these architectures runs on a device of this capability.

    Code runs on its own generation at the same or a later step; with an "a" on that device alone.
    """
    for name in compiled:
        made_for = int(name.rstrip("af"))
        if name.endswith("a"):
            if made_for == capability:
                return True
        elif made_for // 10 == capability // 10 and made_for <= capability:
            return True
    return False


@contextlib.contextmanager
def emulating(module: ModuleType, device: Device) -> Iterator[None]:
    """Inside, the kernels of this module serve tensors on the CPU, as on `device`; for tests."""
    before = _Emulated.module, _Emulated.device
    _Emulated.module, _Emulated.device = module, device
    try:
        yield
    finally:
        _Emulated.module, _Emulated.device = before


def is_emulating() -> bool:
    return _Emulated.module is not None


def device_of(tensor: Tensor) -> Device:
    """The device that a kernel on this tensor runs on."""
    return _Emulated.device or device_facts(tensor.device.index)


def limits(tensor: Tensor) -> Any:
    """The same, as the module wants it."""
    return _limits(cuda_module(), device_of(tensor))


@functools.cache
def _limits(module: Any, device: Device) -> Any:
    return module.DeviceLimits(device.capability, device.num_sms, device.shared_bytes)


def stream_of(tensor: Tensor) -> int:
    """The current stream of the tensor's device, as CUDA knows it."""
    if tensor.device.type != "cuda":
        return 0
    return torch.cuda.current_stream(tensor.device).cuda_stream


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """CUDA launches in the current device: inside, that is the tensor's."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def address(tensor: Tensor | None) -> int:
    """Where a tensor's first element lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def is_float32(tensor: Tensor) -> bool:
    """Whether it is fp32, where the kernels take that beside their 16-bit type."""
    return tensor.dtype == torch.float32
