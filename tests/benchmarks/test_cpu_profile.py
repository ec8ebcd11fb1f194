"""The profile of a decode step: every part has a time, and products are held against a limit."""

import json
import statistics
import time
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks import cpu_profile
from benchmarks.decode_sides import Ours
from fssa_kernels import StepGraph
from fssa_kernels.native import NATIVE
from tests.runtime.models import write_model

pytestmark = pytest.mark.skipif(NATIVE is None, reason="the native kernels are not built")


def test_profile_names_every_part_and_holds_products_against_the_registers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Python reads as time is set here: a call of the step takes a minute, reading the clock a
    millisecond, so that a machine busy with something else changes nothing."""
    monkeypatch.setattr(cpu_profile, "REGISTER_STEPS", 20_000)
    monkeypatch.setattr(cpu_profile, "DECODED", 4)
    replay, now = StepGraph.replay, 0.0

    def clock() -> float:
        nonlocal now
        now += 1e-3
        return now

    def slow(graph: StepGraph, **rows: int) -> None:
        nonlocal now
        now += 60.0
        replay(graph, **rows)

    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(StepGraph, "replay", slow)
    caches: list[torch.Tensor] = []
    fill = cpu_profile.fill_caches

    def remembering(ours: Ours) -> None:
        fill(ours)
        for engine in ours.engines.values():
            caches.extend([engine.cache.k.clone(), engine.cache.v.clone()])

    monkeypatch.setattr(cpu_profile, "fill_caches", remembering)
    folder, target = write_model(tmp_path / "model"), tmp_path / "profile.json"
    arguments = ["--model", str(folder), "--batch", "1,3", "--keys", "300", "--rounds", "2"]
    assert cpu_profile.main([*arguments, "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    assert result["keys"] == 300
    assert (result["model"], result["rank"]) == (str(folder), 16)
    assert caches
    for cache in caches:  # of every row, and nothing that was never written to
        assert cache.shape[1] * cache.shape[2] >= 3 * 300
        assert cache.count_nonzero() > 0.99 * cache.numel()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    linears = [module for module in plain.modules() if isinstance(module, torch.nn.Linear)]
    token_flop = 2 * sum(linear.weight.numel() for linear in linears)
    for batch in ("1", "3"):
        limits = result["multiply_add_flop_per_s"][batch]
        assert len(limits) == 2
        for row in cpu_profile.ROWS:
            step = result["steps"][batch][row]
            assert {*cpu_profile.LINEARS, "head", "paged_attention", "sample"} <= set(step)
            assert min(step.values()) > 0
            between = result["between_steps"][batch][row]
            assert len(between) == 2
            assert 0 < min(between) <= max(between) < 100  # ms: the call's minute is not in it
            seconds = [
                sum(times[part] for part in (*cpu_profile.LINEARS, "head")) / 1e3
                for times in result["raw"][batch][row]
            ]
            base = statistics.median(
                int(batch) * token_flop / taken / limit
                for taken, limit in zip(seconds, limits, strict=True)
            )
            fraction = result["fraction_of_multiply_add"][batch][row]
            if row == "base only":
                assert fraction == pytest.approx(base)
            else:  # A and B besides: less than half of this small model
                assert base < fraction < 1.5 * base


def test_more_keys_than_the_model_has_positions(tmp_path: Path, capsys) -> None:
    folder = write_model(tmp_path / "model")
    with pytest.raises(SystemExit):
        cpu_profile.main(["--model", str(folder), "--keys", "513"])
    assert "--keys: expected at most the model's 512 positions, got 513" in capsys.readouterr().err


def test_the_kernels_of_a_named_instruction_set_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_profile, "REGISTER_STEPS", 20_000)
    monkeypatch.setattr(cpu_profile, "DECODED", 2)
    target, before = tmp_path / "profile.json", NATIVE.instruction_set()
    arguments = ["--model", str(write_model(tmp_path / "model")), "--batch", "1", "--keys", "20"]
    arguments += ["--rounds", "1", "--json", str(target), "--instruction-set"]
    try:
        assert cpu_profile.main([*arguments, "portable"]) == 0
        assert json.loads(target.read_text())["machine"]["instruction_set"] == "portable"
        with pytest.raises(SystemExit):
            cpu_profile.main([*arguments, "sse9"])
        assert "expected one of" in capsys.readouterr().err
    finally:
        NATIVE.set_instruction_set(before)
