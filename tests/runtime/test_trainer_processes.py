"""Several processes that train together, on CPUs, against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fssa_runtime.env import Process, process
from fssa_runtime.training.trainer import TrainSettings, training_device

SCRIPT = """
import json, sys, time
from pathlib import Path
import torch
from transformers import Trainer
from fssa_runtime.env import process
from fssa_runtime.training.reward import RewardConfig, train_reward

torch.set_num_threads(1)
if process().rank == 1:  # the second process writes its part of a checkpoint late
    at_once = Trainer._save_rng_state
    def late(*args):
        time.sleep(0.5)
        at_once(*args)
    Trainer._save_rng_state = late
folder = Path(sys.argv[1])
tasks_per_batch = int(sys.argv[2])
config = RewardConfig.model_validate({
    "data": {"kind": "synthetic", "population": "interval"},
    "encoder": {"latent_dim": 2, "hidden_dim": 8},
    "hidden_dim": 8,
    "tasks": {"context_min": 1, "context_max": 3, "num_targets": 4},
    "train": {
        "output_dir": str(folder / "run"), "steps": 12, "tasks_per_batch": tasks_per_batch,
        "learning_rate": 0.01, "save_every": 6, "log_every": 4, "device": "cpu",
        "progress": "log", "tensorboard": False, "resume": len(sys.argv) > 3,
    },
    "evaluation": {"contexts": [1], "num_tasks": 10, "num_targets": 4},
})
result = train_reward(config)
rank = process().rank
torch.save(result.model.state_dict(), folder / f"weights{rank}.pt")
(folder / f"result{rank}.json").write_text(
    json.dumps([bool(result.metrics), result.fit.history, result.fit.resumed_at])
)
"""


def launch(folder: Path, count: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    script = folder / "train.py"
    script.write_text(SCRIPT)
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *(together if count > 1 else []), str(script), str(folder)]
    hidden = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=240
    )


def trained(folder: Path, count: int, *arguments: str) -> list[dict[str, torch.Tensor]]:
    done = launch(folder, count, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 12/12") == 1, "the main process alone tells"
    return [torch.load(folder / f"weights{rank}.pt") for rank in range(count)]


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    (alone,) = trained(tmp_path / "one", 1, "8")
    first, second = trained(tmp_path / "two", 2, "8")
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name])
        if name == "head_out.bias":  # differences of rewards have no gradient for it but rounding
            continue
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5)
    for checkpoint in (tmp_path / "two" / "run").glob("checkpoint-*"):
        late, last = checkpoint / "rng_state_1.pth", checkpoint / "trainer_state.json"
        assert late.stat().st_mtime_ns <= last.stat().st_mtime_ns, "said to be complete too early"
    results = [
        json.loads((tmp_path / folder / f"result{rank}.json").read_text())
        for folder, rank in (("one", 0), ("two", 0), ("two", 1))
    ]
    assert [measured for measured, *_ in results] == [True, True, False]
    for entry, expected in zip(results[1][1], results[0][1], strict=True):
        assert entry["step"] == expected["step"]
        for name in ("loss", "accuracy"):  # of all tasks of a step, not of the main one's
            assert entry[name] == pytest.approx(expected[name], rel=1e-4)


def test_they_resume_together(tmp_path: Path) -> None:
    whole = trained(tmp_path / "run", 2, "8")
    newest = tmp_path / "run" / "run" / "checkpoint-12"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    parts = trained(tmp_path / "run", 2, "8", "resume")
    assert json.loads((tmp_path / "run" / "result1.json").read_text())[2] == 6
    for name, tensor in whole[0].items():
        assert torch.equal(parts[0][name], tensor)


def test_tasks_that_cannot_be_shared_are_an_error(tmp_path: Path) -> None:
    done = launch(tmp_path / "run", 2, "7")
    assert done.returncode != 0
    assert (
        "tasks_per_batch: expected a multiple of 2, the number of processes, got 7" in done.stderr
    )


def test_where_a_process_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = TrainSettings(output_dir=tmp_path, steps=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert process() == Process(5, 1, 8)
    assert not process().is_main
    assert training_device(settings) == torch.device("cuda", 1)
    on_cpu = settings.model_copy(update={"device": "cpu"})
    assert training_device(on_cpu) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training_device(settings) == torch.device("cpu")
