"""What a source distribution holds, and what the scripts of `.ci` ask of Python."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools.command.egg_info import FileList

ROOT = Path(__file__).resolve().parent.parent


def test_a_source_distribution_has_what_tests_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    packed = FileList()
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        before = len(packed.files)
        packed.process_template_line(line)
        assert len(packed.files) > before or "exclude" in line, f"{line}: nothing of that name"
    for folder in (".ci", "benchmarks", "csrc", "docs", "recipes", "tests"):
        assert any(name.startswith(f"{folder}/") for name in packed.files), folder
    assert "constraints.txt" in packed.files  # the test command of the README names it


def test_ci_finds_the_lint_extra_on_every_python() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    (program,) = re.findall(r"<< 'END'\n(.*?)^END$", script, flags=re.DOTALL | re.MULTILINE)
    as_on_3_10 = "import sys\nsys.modules['tomllib'] = None\n" + program
    run = subprocess.run([sys.executable, "-c", as_on_3_10], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.findall(r"^[\w-]+", run.stdout, re.MULTILINE) == ["ruff", "mypy", "pre-commit"]
