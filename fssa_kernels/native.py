"""Loading of the native module, and the codes it shares with csrc.

The module is optional: without a compiler the package installs and works on the references. What
kept it from loading is part of every verdict that `explain` gives on a native backend.
"""

import importlib
from types import ModuleType

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}  # DType in csrc/common/dtype.h


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("fssa_kernels._native"), None
    except ModuleNotFoundError:
        return None, "fssa_kernels._native was not built (no C++ compiler at installation)"
    except ImportError as error:
        return None, f"fssa_kernels._native is built but does not load: {error}"


# torch is imported above, so the module's OpenMP symbols bind to the runtime torch brought along:
# one pool of threads, not two that take turns on the same cores.
NATIVE, MISSING = _load()
