"""``fssa train reward`` as somebody meets it: what it prints, where, and how it fails."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import TrainerControl, TrainerState, TrainingArguments

from fssa_runtime import LLM
from fssa_runtime.cli import main
from fssa_runtime.training.progress import StepBar, StepLines, counted, shown_by, step_line

from .conditioned import random_conditioning, small_model
from .reward_recipes import small_recipe, write_yaml


def shown_recipe(folder: Path, **changes: object) -> dict:
    recipe = small_recipe(folder / "run", **changes)
    recipe["train"] |= {"steps": 4, "tasks_per_batch": 4, "log_every": 2, "warmup_steps": 0}
    recipe["evaluation"] = {"contexts": [0, 1], "num_tasks": 10, "num_targets": 2}
    recipe["train"] = {k: v for k, v in recipe["train"].items() if k != "progress"}
    return recipe


def train(recipe: Path) -> int:
    return main(["train", "reward", "--config", str(recipe)])


def test_steps_and_a_table_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(write_yaml(tmp_path / "r.yaml", shown_recipe(tmp_path))) == 0
    out, err = capsys.readouterr()
    assert "step 2/4  loss " in out
    assert "step 4/4  loss " in out
    for word in ("choices", "accuracy", "calibration", "heldout"):
        assert word in out
    assert "…" not in out, "a header was cut off"
    assert out.rstrip().endswith(f"written to {tmp_path / 'run'}")
    assert "it/s" not in err, "a bar where nobody watches"


def test_lines_leave_at_once_even_into_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe))
    state = TrainerState(global_step=50, max_steps=300, is_world_process_zero=True)
    arguments, control = TrainingArguments(output_dir="unused"), TrainerControl()
    lines = StepLines()
    lines.on_log(arguments, state, control, {"loss": 0.5, "learning_rate": 1e-3, "epoch": 0.1})
    assert pipe.getvalue() == b"step 50/300  loss 0.5  learning rate 0.001\n"
    lines.on_log(arguments, state, control, {"train_runtime": 3.0})
    assert pipe.getvalue().count(b"\n") == 1
    assert step_line(1, 2, {"loss": math.nan}) == "step 1/2  loss nan"


def test_a_bar_is_for_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown_by("off") is None
    assert type(shown_by("bar")) is StepLines
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert type(shown_by("bar")) is StepBar
    assert type(shown_by("log")) is StepLines


def text_recipe(folder: Path, options: str) -> dict:
    with (folder / "choices.jsonl").open("w") as file:
        for user in range(4):
            for prompt in range(4):
                chosen, rejected = ("long " * 4, "short")[:: 1 if user % 2 else -1]
                record = {"user": user, "prompt": f"p{prompt}"}
                file.write(json.dumps(record | {"chosen": chosen, "rejected": rejected}) + "\n")
    recipe = shown_recipe(folder)
    recipe["data"] = {"kind": "preferences", "files": [str(folder / "choices.jsonl")]}
    recipe["data"] |= {"heldout_users": 0.5, "heldout_prompts": 0.5}
    recipe["options"] = {"model": options, "dtype": "float32"}
    recipe["encoder"] = {"latent_dim": 2, "hidden_dim": 8, "stochastic": True}
    recipe["objective"] = "marginal"
    recipe["tasks"] = {"context_max": 1, "num_targets": 1}
    recipe["evaluation"]["contexts"] = [0, 12]
    return recipe


def test_a_reward_on_texts_can_be_asked_what_to_ask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model(tmp_path / "model")
    recipe = text_recipe(tmp_path, str(tmp_path / "model"))
    assert train(write_yaml(tmp_path / "r.yaml", recipe)) == 0
    out = capsys.readouterr().out
    assert "8 of 8 options read by the base model" in out
    assert "heldout: not measured with 12 choices" in out
    llm = LLM(model, random_conditioning(model, "gated"))
    llm.users.infer("ana", [("p0", "short", "long long")])
    candidates = [("p1", "long " * 4, "short"), ("p2", "either", "or")]
    found = llm.users.suggest_next_pair("ana", candidates, tmp_path / "run")
    assert found.information.shape == (2,)
    assert (found.information >= -1e-9).all()
    assert (found.information <= math.log(2)).all()


def test_nothing_measured_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_model(tmp_path / "model")
    recipe = text_recipe(tmp_path, str(tmp_path / "model"))
    recipe["evaluation"]["contexts"] = [12]
    assert train(write_yaml(tmp_path / "r.yaml", recipe)) == 0
    out = capsys.readouterr().out
    for split in ("heldout", "known users new prompts", "new users known prompts"):
        assert f"{split}: not measured with 12 choices" in out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["heldout"] == {"contexts": {}, "skipped_contexts": [12]}


def failure(recipe: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert train(recipe) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def test_failures_name_file_and_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    assert f"{path}: No such file" in failure(path, capsys)

    write_yaml(path, shown_recipe(tmp_path) | {"hiden_dim": 3})
    assert "r.yaml: not a valid RewardConfig\n  hiden_dim: Extra" in failure(path, capsys)

    recipe = shown_recipe(tmp_path)
    del recipe["train"]["steps"]
    assert "\n  train.steps: Field required\n" in failure(write_yaml(path, recipe), capsys)

    recipe = text_recipe(tmp_path, str(tmp_path / "no-model"))
    found = failure(write_yaml(path, recipe), capsys)
    assert f"r.yaml: options.model: {tmp_path / 'no-model'}: no such folder" in found
    del recipe["options"]
    found = failure(write_yaml(path, recipe), capsys)
    assert "r.yaml: options: expected the base model" in found
    recipe["data"]["files"] = [str(tmp_path / "nothing.jsonl")]
    found = failure(write_yaml(path, recipe), capsys)
    assert f"r.yaml: data.files: expected a file, found none at {tmp_path}/nothing.jsonl" in found


def test_identical_options_are_named_by_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_model(tmp_path / "model")
    recipe = text_recipe(tmp_path, str(tmp_path / "model"))
    with (tmp_path / "choices.jsonl").open("a") as file:
        file.write('{"user": 1, "prompt": "p", "chosen": "same", "rejected": "same"}\n')
    found = failure(write_yaml(tmp_path / "r.yaml", yaml.safe_dump(recipe)), capsys)
    assert "choices.jsonl:17: fields 'chosen' and 'rejected': expected two different" in found


@pytest.mark.parametrize("module", ["fssa_runtime", "fssa_runtime.cli"])
def test_either_module_runs(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("fssa ")


def test_what_is_counted_is_shown_in_tenths_where_there_is_no_terminal(capsys):
    with counted("reading", 40) as count:
        for more in (1, 2, 1, 30, 6):
            count(more)
    assert capsys.readouterr().out.splitlines() == [
        "reading: 4 of 40",
        "reading: 34 of 40",
        "reading: 40 of 40",
    ]
