"""The kernels' tests in Triton's interpreter, which has to be switched on before Triton loads."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_in_the_interpreter() -> None:
    folder = Path(__file__).parent / "triton"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(folder)]
    ran = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=folder.parent.parent,
        capture_output=True,
        text=True,
        timeout=880,
    )
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
