"""What the CUDA kernels are compiled for: what was asked for, as far as the compiler knows it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parent.parent / "setup.py"

Architectures = Callable[[str | None], list[str]]


@pytest.fixture
def architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Architectures:
    """setup.py's, of a TORCH_CUDA_ARCH_LIST, with an nvcc that knows no older ones than sm_80."""
    setuptools = pytest.importorskip("setuptools")
    helpers = pytest.importorskip("pybind11.setup_helpers")
    if not SETUP.is_file():
        pytest.skip(f"there is no {SETUP}")
    monkeypatch.chdir(SETUP.parent)
    monkeypatch.setenv("FSSA_BUILD", "cpu")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(helpers.ParallelCompile, "install", lambda _: None)
    spec = importlib.util.spec_from_file_location("fssa_setup", SETUP)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\n[ "$*" = --list-gpu-code ] && printf "sm_%s\\n" 80 86 90 100\n')
    nvcc.chmod(0o755)

    def ask(asked: str | None) -> list[str]:
        if asked is None:
            monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        else:
            monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
        return module.architectures(str(nvcc))

    return ask


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, ["80", "86", "90a", "100"]),  # ours without 89 and 120, which it does not know
        ("", ["80", "86", "90a", "100"]),
        ("8.0;9.0a", ["80", "90a"]),
        ("80 90a", ["80", "90a"]),
        ("10.0f, 8.6 8.6", ["100f", "86"]),
        ("7.5 8.0", ["80"]),
        ("9.0a+PTX", ["90a"]),
    ],
)
def test_what_was_asked_for_is_compiled(
    architectures: Architectures, asked: str | None, expected: list[str]
) -> None:
    assert architectures(asked) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("7.0;7.5", "expected one from 8.0 on, got '7.0;7.5'"),
        ("8.0;12.0", "expected some of 100, 80, 86, 90, which .*nvcc knows, got 120$"),
        ("8.0;Hopper", "expected architectures such as 8.0 or 9.0a, got 'Hopper'"),
    ],
)
def test_what_cannot_be_compiled_is_named(
    architectures: Architectures, asked: str, message: str
) -> None:
    with pytest.raises(Exception, match=f"TORCH_CUDA_ARCH_LIST: {message}"):
        architectures(asked)
