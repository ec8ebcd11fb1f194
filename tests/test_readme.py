"""The README says what is: its tables are the result files', its code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.readme_tables import NOT_MEASURED, TABLES, fill

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_tables_are_those_of_the_result_files() -> None:
    assert fill(README) == README


def test_every_table_stands_in_the_readme_and_was_measured() -> None:
    assert sorted(re.findall(r"<!-- table: (\w+) -->", README)) == sorted(TABLES)
    for make in TABLES.values():
        assert make() != NOT_MEASURED


def test_the_op_snippet_runs() -> None:
    (snippet,) = [s for s in SNIPPETS if "modulated_linear" in s]
    names: dict = {}
    exec(snippet, names)
    assert names["y"].shape == (4, 96)


@pytest.mark.real_model
def test_the_model_snippets_run(real_model_name: str, capsys: pytest.CaptureFixture[str]) -> None:
    snippets = [s for s in SNIPPETS if real_model_name in s]
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet.replace("max_tokens=64", "max_tokens=12"), {})
        assert len(capsys.readouterr().out.split()) > 4


def test_links_and_paths_exist() -> None:
    for path in re.findall(r"(?:recipes|benchmarks)/[\w/.]+\w", README):
        assert (ROOT / path).exists(), path
