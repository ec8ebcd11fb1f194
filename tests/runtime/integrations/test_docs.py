"""docs/INTEGRATIONS.md says what is: its Python runs from top to bottom, its commands parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fssa_runtime.cli import _parser, main

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "INTEGRATIONS.md").read_text("utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = re.findall(r"^    fssa (.*)$", TEXT, flags=re.MULTILINE)


def test_commands_are_commands() -> None:
    parsed = [_parser().parse_args(shlex.split(command)) for command in COMMANDS]
    assert len(parsed) == 3


@pytest.mark.real_model
def test_snippets_and_lora_commands_run(
    real_model_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for snippet in SNIPPETS:
        exec(snippet, names)
    texts = names["tokenizer"].batch_decode(names["tokens"], skip_special_tokens=True)
    assert len(set(texts)) > 1
    assert len(names["answers"]) == 2
    for command in COMMANDS:
        if "lora" in command:
            assert main(shlex.split(command)) == 0
