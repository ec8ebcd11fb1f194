"""The command line and the demo, on a small random model; errors as a user meets them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fssa_kernels.native import NATIVE
from fssa_runtime.cli import main
from fssa_runtime.conditioning.choices import Choice
from fssa_runtime.demo import USERS_FILE
from fssa_runtime.errors import InputError
from fssa_runtime.training.data import Message
from fssa_runtime.users.examples import ExampleUser, read_users, write_users

from .conditioned import CHOICES, random_conditioning, small_model

USERS = [
    ExampleUser("Ana", CHOICES, {"length": -1.0}),
    ExampleUser("Ben", tuple(Choice(c.prompt, c.rejected, c.chosen) for c in CHOICES)),
    ExampleUser("Cleo", CHOICES[:1], {"lists": 1.0}),
    ExampleUser("Dan", ()),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    model = small_model(folder / "model")
    random_conditioning(model, "gated").save(folder / "conditioning")
    write_users(USERS, folder / "conditioning" / USERS_FILE)
    return folder


def demo(base: Path, *more: str) -> int:
    arguments = ["demo", "--model", str(base / "model"), "--max-tokens", "8"]
    return main([*arguments, "--conditioning", str(base / "conditioning"), *more])


def test_demo_proves_that_rows_are_their_users(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo(base, "--json", str(tmp_path / "out.json")) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert [user["name"] for user in result["users"]] == ["Ana", "Ben", "Cleo", "Dan"]
    assert result["users"][0]["choices"][0]["chosen"] == CHOICES[0].chosen
    assert result["users"][0]["taste"] == "short"
    assert result["users"][1]["taste"] is None
    assert (result["batch_rows"], result["distinct_users"]) == (5, 4)
    assert NATIVE is None or result["eager_reason"] is None
    assert result["max_abs_logprob_diff_vs_solo"] <= 1e-4
    assert 0 < result["max_abs_logprob_diff_vs_merged"] <= 1e-4
    assert result["tokens_per_s_batched"] > 0
    assert result["tokens_per_s_one_by_one"] > 0
    assert set(result["taste_scores"][0]["user"]) == {"length"}
    printed = capsys.readouterr().out
    for name in ("Ana", "Ben", "Cleo", "Dan", "nobody", "tokens/s"):
        assert name in printed


def test_demo_obeys_users_and_prompt(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert demo(base, "--json", str(out), "--users", "2", "--prompt", "Hm?") == 0
    result = json.loads(out.read_text())
    assert len(result["users"]) == 2
    assert result["prompt"] == "Hm?"


def test_brackets_and_colons_are_no_markup(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "[old]:bug:").symlink_to(base / "model")
    users, out = tmp_path / "users.json", tmp_path / "out.json"
    write_users([ExampleUser("[/b]:bug:", CHOICES, {"length": 1.0})], users)
    prompt = "What does [/INST] mean? :bug:"
    asked = ["--prompt", prompt, "--users-file", str(users), "--json", str(out)]
    assert demo(base, *asked, "--model", str(tmp_path / "[old]:bug:")) == 0
    assert json.loads(out.read_text())["prompt"] == prompt
    printed = capsys.readouterr().out.replace("\n", "")
    for text in ("[old]:bug:", f"“{prompt}”"):
        assert text in printed
    assert printed.count("[/b]:bug:") == 2  # beside the text and beside what it measures


def test_the_json_is_there_before_anything_is_printed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fssa_runtime.demo._print", interrupt)
    assert demo(base, "--json", str(tmp_path / "out.json")) == 130
    assert json.loads((tmp_path / "out.json").read_text())["batch_rows"] == 5


@pytest.mark.parametrize(
    ("weights", "file", "message"),
    [
        ({"lenght": 1.0}, "out.json", "user 'Ana': weights: "),
        ({}, "no_folder/out.json", "no_folder/out.json cannot be written: No such file"),
        ({}, "", "cannot be written: Is a directory"),
    ],
)
def test_what_cannot_be_written_is_refused_before_a_model_is_loaded(
    base: Path,
    tmp_path: Path,
    weights: dict[str, float],
    file: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: Any, **__: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("fssa_runtime.demo.LanguageModel.load", never)
    write_users([ExampleUser("Ana", CHOICES, weights)], tmp_path / "users.json")
    arguments = ["--users-file", str(tmp_path / "users.json"), "--json", str(tmp_path / file)]
    assert demo(base, *arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--users", "9"], "1 to 4"),
        (["--users", "0"], "1 to 4"),
        (["--prompt", "  "], "--prompt"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--max-tokens", "5000"], "positions"),
        (["--conditioning", "nowhere"], "nowhere"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--users-file", "none.json"], "none.json"),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    base: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.json"
    assert demo(base, "--json", str(out), *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("fssa: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_no_conditioning_ships_for_other_models(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--model", str(base / "model")]) == 1
    assert "train one" in capsys.readouterr().err


def test_pull_of_an_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "nothing"]) == 1
    assert "smollm2-135m-instruct" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["demo"], ["pull"], ["train"], ["data"], ["evaluate"]])
def test_help_is_there_and_quick(command: list[str]) -> None:
    script = "import sys; from fssa_runtime.cli import main; main(sys.argv[1:])"
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", script, *command, "--help"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0
    assert "usage: fssa" in run.stdout
    # Nobody waits for torch to read a help text.
    assert not re.search(r"\|\s+torch$", run.stderr, re.MULTILINE)


def test_users_file_round_trip_and_faults(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Why?"}]
    users = [
        *USERS,
        ExampleUser("Eve", (Choice(turns, "So.", ("No.", "Hm.")), Choice("Why?", "a", "b"))),
    ]
    write_users(users, tmp_path / "u.json")
    assert read_users(tmp_path / "u.json") == users
    pairs = Choice((Message("user", "Why?"),), "So.", [[("assistant", "No.")], "Hm."])
    write_users([ExampleUser("Fay", (pairs,))], tmp_path / "u.json")
    answers = ([{"role": "assistant", "content": "No."}], "Hm.")
    assert read_users(tmp_path / "u.json")[0].choices == (Choice(turns, "So.", answers),)
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    for content, message in [
        ("{", "not JSON"),
        ("[]", "at least one"),
        ('[{"name": "x"}]', "user 0"),
        ('[{"name": "x", "choices": []}, {"name": "x", "choices": []}]', "twice"),
        ('[{"name": null, "choices": []}]', "user 0: name: expected text, got None"),
        *(
            (json.dumps([{"name": "x", "choices": [good, {**good, field: value}]}]), message)
            for field, value, message in [
                ("prompt", None, "user 0: choice 1: prompt: expected text or chat messages"),
                ("chosen", ["a", "b"], "user 0: choice 1: chosen: expected text or chat"),
                ("rejected", ["b", None], "user 0: choice 1: rejected: expected text or chat"),
                ("rejected", [], "user 0: choice 1: expected at least one rejected answer"),
                ("rejected", "a", "user 0: choice 1: chosen and rejected are the same"),
            ]
        ),
    ]:
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(InputError, match=message):
            read_users(tmp_path / "bad.json")
