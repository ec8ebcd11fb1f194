"""Triton's kernels in its interpreter, in a process of its own: see tests/test_triton.py."""

import pytest

from tests.kernels.conftest import _one_thread, _poisoned_outputs  # noqa: F401

pytest.importorskip("triton")
from fssa_kernels.gpu.backend import is_interpreting

if is_interpreting():
    from fssa_kernels.gpu.interpreter import repair

    repair()
else:
    collect_ignore_glob = ["test_*.py"]
