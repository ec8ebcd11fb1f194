"""Settings for every test, and the real model for those that need it."""

from __future__ import annotations

import os

# Before torch is imported: tests run small shapes, for which more threads only wait for each other.
# Triton's interpreter has a core besides, and two threads that wait for each other on the one core
# that is left take longer than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fssa_runtime.errors import InputError
from fssa_runtime.models.pull import DEFAULT_MODEL, pull


@pytest.fixture(scope="session")
def real_model_name() -> str:
    """The default model, pulled. Without a network the test is skipped, in CI it fails."""
    try:
        pull(DEFAULT_MODEL, show_progress=False)
    except InputError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the default model is not here and cannot be had: {error}")
    return DEFAULT_MODEL


# The process that runs tests/triton, or None without Triton, and the file of what it prints.
INTERPRETED = pytest.StashKey[tuple[subprocess.Popen[bytes] | None, Path]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the kernels' tests in Triton's interpreter, if this session waits for them."""
    wanted = any(item.path.name == "test_triton.py" for item in session.items)
    if not wanted or session.config.option.collectonly:
        return
    root = Path(__file__).parent.parent
    output = Path(tempfile.mkdtemp(prefix="fssa-triton-")) / "output.txt"
    process = None
    if importlib.util.find_spec("triton") is not None:
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/triton"],
                env={**os.environ, "TRITON_INTERPRET": "1"},
                cwd=root,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
    session.config.stash[INTERPRETED] = process, output


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the other process with this one."""
    process, output = session.config.stash.get(INTERPRETED, (None, None))
    if process is not None and process.poll() is None:
        process.terminate()
        process.wait(timeout=30)
    if output is not None:
        output.unlink(missing_ok=True)
        output.parent.rmdir()
