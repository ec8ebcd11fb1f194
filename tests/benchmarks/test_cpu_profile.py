"""The profile of a decode step: every part has a time, and products are held against a limit."""

import json
import time
from pathlib import Path

import pytest

from benchmarks import cpu_profile
from fssa_kernels import StepGraph
from fssa_kernels.native import NATIVE
from tests.runtime.models import write_model


@pytest.mark.skipif(NATIVE is None, reason="the native kernels are not built")
def test_profile_names_every_part_and_holds_products_against_the_registers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_profile, "REGISTER_STEPS", 20_000)
    monkeypatch.setattr(cpu_profile, "DECODED", 4)
    replay = StepGraph.replay

    def slow(graph: StepGraph, **rows: int) -> None:
        time.sleep(0.05)
        replay(graph, **rows)

    monkeypatch.setattr(StepGraph, "replay", slow)
    folder, target = write_model(tmp_path / "model"), tmp_path / "profile.json"
    arguments = ["--model", str(folder), "--batch", "1,3", "--keys", "20", "--rounds", "2"]
    assert cpu_profile.main([*arguments, "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    for batch in ("1", "3"):
        for row in cpu_profile.ROWS:
            step = result["steps"][batch][row]
            assert {*cpu_profile.LINEARS, "head", "paged_attention", "sample"} <= set(step)
            assert min(step.values()) > 0
            assert 0 < result["fraction_of_multiply_add"][batch][row] < 1
            between = result["between_steps"][batch][row]
            assert len(between) == 2
            assert 0 < min(between) < 50  # ms: what the call itself takes is not in it
        assert len(result["multiply_add_flop_per_s"][batch]) == 2
