"""What is made of the accuracies of trained policies, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.policies import (
    EVERYBODY,
    FAMILIES,
    KINDS,
    PROMPT,
    RECIPES,
    closed,
    finished,
    variants,
)
from fssa_runtime.conditioning.layout import RowLayout
from fssa_runtime.integrations.modules import ModelShape
from fssa_runtime.training.policy_recipe import PolicyConfig
from fssa_runtime.training.trainer import load_config


def measured(accuracies: dict[str, float], n: str = "0") -> dict:
    mean = sum(accuracies.values()) / len(accuracies)
    modes = {kind: {"accuracy": value} for kind, value in accuracies.items()}
    return {"contexts": {n: {"accuracy": mean, "modes": modes}}}


def test_the_gap_that_is_closed() -> None:
    runs = {
        EVERYBODY: measured(dict.fromkeys(KINDS, 0.5)),
        **{f"DPO, {kind}": measured({kind: 0.8}) for kind in KINDS},
        "ours": measured(dict(zip(KINDS, (0.8, 0.65, 0.7, 0.5), strict=True)), "10"),
    }
    found = closed(runs, "ours", "10")
    assert found["share"] == pytest.approx((0.3 + 0.15 + 0.2 + 0.0) / (4 * 0.3))
    assert found["kinds"]["lists+"] == {"accuracy": 0.7, "everybody": 0.5, "dedicated": 0.8}


def test_families_are_compared_at_about_equal_numbers_a_user() -> None:
    every = variants(load_config(RECIPES / "policy.yaml", PolicyConfig))
    model = ModelShape(30, 576, (576, 192, 192), (1536, 1536))
    sizes = {}
    for name in FAMILIES:
        modulator = every[name].modulator
        assert modulator is not None
        sizes[name] = RowLayout(modulator, model).generated_width
    assert sizes.pop("NP-DPO, film") == 2 * 576 * 30  # the paper's: every block
    assert max(sizes.values()) < 1.03 * min(sizes.values())


def test_a_run_is_read_only_if_its_recipe_is_the_same(tmp_path: Path) -> None:
    every = variants(load_config(RECIPES / "policy.yaml", PolicyConfig))
    assert set(every) == {*FAMILIES, EVERYBODY, *(f"DPO, {kind}" for kind in KINDS), PROMPT}
    config = every[EVERYBODY]
    wanted, metrics = finished(config, tmp_path, seed=3)
    assert metrics is None
    assert wanted.train.seed == 3
    record = {"recipe": wanted.model_dump(mode="json"), "heldout": {}}
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    assert finished(config, tmp_path, seed=3)[1] == record
    assert finished(config, tmp_path, seed=4)[1] is None
    assert finished(every["DPO, length+"], tmp_path, seed=3)[1] is None
