"""What a source distribution holds."""

from __future__ import annotations

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
