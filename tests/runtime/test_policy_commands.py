"""``fssa train policy`` and ``fssa evaluate``, from files to files, as somebody meets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fssa_runtime.cli import main
from fssa_runtime.conditioning.checkpoint import WEIGHTS_FILE
from fssa_runtime.training import swap_test
from fssa_runtime.training.policy import CONDITIONING_DIR
from fssa_runtime.training.population import (
    PopulationConfig,
    build_preferences,
    candidates,
    heldout_answers,
    simulate,
    write_preferences,
)
from fssa_runtime.training.reward_recipe import PreferenceFiles
from fssa_runtime.training.trainer import METRICS_FILE

from .conditioned import small_model
from .reward_recipes import write_yaml

POPULATION = {
    "tastes": ["length"],
    "num_users": 16,
    "choices_per_user": 24,
    "strength": 30.0,
    "pure": 1.0,
}
ANSWERS = [
    {
        "prompt": f"Tell {number}",
        "answer": " ".join(f"w{word}" for word in range(length)),
        "finish_reason": "stop",
        "style": length,
        "sample": 0,
    }
    for number in range(12)
    for length in (4, 9, 16)
]
NEW_PROMPTS = ["Explain bread", "Explain rain", "Explain sleep"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, choices, answers, prompts, and recipes for a policy and its evaluation."""
    folder = tmp_path_factory.mktemp("policy_commands")
    small_model(folder / "model")
    preferences, _ = build_preferences(ANSWERS, PopulationConfig(**POPULATION))
    write_preferences(preferences, folder / "choices.jsonl")
    with open(folder / "answers.jsonl", "w") as file:
        file.writelines(json.dumps(answer) + "\n" for answer in ANSWERS)
    (folder / "prompts.txt").write_text("\n".join(["Tell 0", *NEW_PROMPTS]) + "\n")
    model = str(folder / "model")
    data = {"kind": "preferences", "files": [str(folder / "choices.jsonl")]}
    write_yaml(
        folder / "policy.yaml",
        {
            "model": model,
            "dtype": "float32",
            "data": data,
            "tasks": {"context_min": 1, "context_max": 3, "num_targets": 2},
            "encoder": {"latent_dim": 4, "hidden_dim": 16, "aggregate": "mean"},
            "modulator": {
                "latent_dim": 4,
                "families": [{"family": "gated", "sites": ["q", "v", "o"], "rank": 2}],
            },
            "train": {
                "output_dir": str(folder / "run"),
                "steps": 12,
                "learning_rate": 0.05,
                "tasks_per_batch": 4,
                "log_every": 2,
                "warmup_steps": 0,
                "tensorboard": False,
            },
            "evaluation": {"contexts": [1, 2], "num_tasks": 10, "num_targets": 2},
        },
    )
    write_yaml(
        folder / "evaluate.yaml",
        {
            "model": model,
            "conditioning": str(folder / "run" / CONDITIONING_DIR),
            "dtype": "float32",
            "data": data,
            "answers": str(folder / "answers.jsonl"),
            "prompts": str(folder / "prompts.txt"),
            "population": POPULATION,
            "first_prompt": 1,
            "num_prompts": 3,
            "users_per_side": 2,
            "num_choices": 3,
            "mixtures": [0.5],
            "max_tokens": 6,
        },
    )
    return folder


def train(folder: Path, *flags: str) -> int:
    return main(["train", "policy", "--config", str(folder / "policy.yaml"), *flags])


def evaluate(folder: Path, output: Path) -> int:
    config = str(folder / "evaluate.yaml")
    return main(["evaluate", "--config", config, "--output", str(output)])


def test_a_policy_is_trained_measured_and_put_to_the_swap_test(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = folder / "results" / "swap.json"
    assert evaluate(folder, output) == 1, "there is no policy yet"
    assert "conditioning" in capsys.readouterr().err
    assert not output.exists()

    assert train(folder) == 0
    out, err = capsys.readouterr()
    assert "step 12/12  loss " in out
    assert "measuring on new people: 20 of 20" in out
    assert "worst kind" in out
    assert out.rstrip().endswith(f"checkpoint: {folder / 'run' / CONDITIONING_DIR}")
    assert "Traceback" not in err
    metrics = json.loads((folder / "run" / METRICS_FILE).read_text())
    assert set(metrics["heldout"]["contexts"]) == {"1", "2"}

    assert train(folder) == 1, "what lies there is not overwritten unasked"
    assert "--overwrite" in capsys.readouterr().err
    assert train(folder, "--resume") == 0, "nothing is left to do"
    assert json.loads((folder / "run" / METRICS_FILE).read_text())["heldout"] == metrics["heldout"]
    capsys.readouterr()

    offered: list[dict[str, list[str]]] = []

    def watched(answers: dict[str, list[str]], *rest: Any, **settings: Any) -> list:
        offered.append(answers)
        return simulate(answers, *rest, **settings)

    monkeypatch.setattr(swap_test, "simulate", watched)
    assert evaluate(folder, output) == 0
    texts_by_prompt = candidates(ANSWERS, 3)
    files = PreferenceFiles(kind="preferences", files=(folder / "choices.jsonl",))
    assert offered == [heldout_answers(files, texts_by_prompt)] * 2, "one for more, one for less"
    assert 0 < len(offered[0]) < len(texts_by_prompt)
    out = capsys.readouterr().out
    assert "answering under every condition: 12 of 12" in out
    assert "length: more − less =" in out
    result = json.loads(output.read_text())
    names = ["unmodulated", "length less", "length mix 0.5", "length more"]
    assert list(result["conditions"]) == names
    texts = {name: summary["texts"] for name, summary in result["conditions"].items()}
    assert {len(written) for written in texts.values()} == {len(NEW_PROMPTS)}
    assert len({json.dumps(written) for written in texts.values()}) > 1, "nobody was modulated"
    swap = result["swap"]["length"]
    means = [result["conditions"][n]["tastes"]["length"]["mean"] for n in names[1:]]
    assert swap["means_from_less_to_more"] == pytest.approx(means)
    assert swap["more_minus_less"]["mean"] == pytest.approx(means[-1] - means[0])

    assert evaluate(folder, folder / "again.json") == 0
    again: dict[str, Any] = json.loads((folder / "again.json").read_text())
    assert again["conditions"] == result["conditions"], "seeds decide what is written"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_prompt": 2}, "num_prompts: expected at most 2"),
        ({"first_prompt": 0}, "'Tell 0'"),
        ({"prompts": "no_such_file.txt"}, "no_such_file.txt"),
        ({"mixtures": ["half"]}, "mixtures"),
        ({"max_tokns": 3}, "max_tokns"),
    ],
)
def test_an_evaluation_that_cannot_be_says_why(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, message: str
) -> None:
    recipe = yaml.safe_load((folder / "evaluate.yaml").read_text()) | changes
    config = write_yaml(tmp_path / "evaluate.yaml", recipe)
    arguments = ["evaluate", "--config", str(config), "--output", str(tmp_path / "swap.json")]
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "swap.json").exists()


def test_paths_are_printed_as_they_are(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"kind": "preferences", "files": [str(folder / "choices.jsonl")], "heldout_prompts": 0.5}
    users = {"data": data, "users": {"Ana": {"length": 1.0}}, "num_choices": 1}
    recipes = {"choices": POPULATION, "users": users | {"population": POPULATION}}
    for step, recipe in recipes.items():
        output = tmp_path / "[old]" / step
        arguments = ["--answers", str(folder / "answers.jsonl"), "--output", str(output)]
        config = write_yaml(tmp_path / "recipe.yaml", recipe)
        assert main(["data", step, *arguments, "--config", str(config)]) == 0
        assert f" in {output}" in capsys.readouterr().out


def test_a_folder_for_a_result_is_refused_before_the_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(folder, tmp_path) == 1
    assert "cannot be written: Is a directory" in capsys.readouterr().err


def test_a_policy_without_its_choices_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = yaml.safe_load((folder / "policy.yaml").read_text())
    recipe["data"]["files"] = [str(tmp_path / "gone.jsonl")]
    config = write_yaml(tmp_path / "policy.yaml", recipe)
    assert main(["train", "policy", "--config", str(config)]) == 1
    assert "gone.jsonl" in capsys.readouterr().err


def test_a_run_that_was_killed_goes_on_to_the_same_policy(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL somewhere after the second checkpoint; a run that was left alone is the reference."""
    recipe = yaml.safe_load((folder / "policy.yaml").read_text())
    recipe["train"] |= {"steps": 40, "learning_rate": 0.01, "save_every": 5}
    runs = {}
    for name in ("whole", "killed"):
        runs[name] = tmp_path / name
        recipe["train"]["output_dir"] = str(runs[name])
        write_yaml(tmp_path / f"{name}.yaml", recipe)
    command = ["train", "policy", "--config"]
    assert main([*command, str(tmp_path / "whole.yaml")]) == 0
    killed = str(tmp_path / "killed.yaml")
    process = subprocess.Popen([sys.executable, "-m", "fssa_runtime", *command, killed])
    try:
        deadline = time.monotonic() + 120
        while not (runs["killed"] / "checkpoint-10" / "trainer_state.json").is_file():
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline, "there is no checkpoint"
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert not (runs["killed"] / CONDITIONING_DIR).exists(), "killed too late"
    capsys.readouterr()
    assert main([*command, killed, "--resume"]) == 0
    out = capsys.readouterr().out
    assert "step 40/40  loss " in out
    assert "step 2/40  loss " not in out, "it began anew"
    whole, resumed = (
        load_file(runs[name] / CONDITIONING_DIR / WEIGHTS_FILE) for name in ("whole", "killed")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_two_processes_train_the_policy_of_one(folder: Path, tmp_path: Path) -> None:
    """As `torchrun` starts them, on CPUs: the same tasks and steps, their gradients averaged."""
    recipe = yaml.safe_load((folder / "policy.yaml").read_text())
    recipe["train"] |= {"steps": 6, "learning_rate": 0.01, "device": "cpu"}
    recipe |= {"nll_weight": 0.5, "loop_weight": 0.5}
    trained = {}
    for name, count in (("one", 1), ("two", 2)):
        recipe["train"]["output_dir"] = str(tmp_path / name)
        config = write_yaml(tmp_path / f"{name}.yaml", recipe)
        done = together(count, "train", "policy", "--config", str(config))
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("step 6/6") == 1, "the main process alone tells"
        trained[name] = load_file(tmp_path / name / CONDITIONING_DIR / WEIGHTS_FILE)
    for tensor_name, expected in trained["one"].items():
        torch.testing.assert_close(trained["two"][tensor_name], expected, rtol=1e-3, atol=1e-4)


def together(count: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``fssa`` in one process, or in several that find each other on the loopback interface."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *(launcher if count > 1 else []), "-m", "fssa_runtime", *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.endswith(("RANK", "WORLD_SIZE"))}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
