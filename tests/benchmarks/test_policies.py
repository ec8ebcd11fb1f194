"""What is made of the accuracies of trained policies, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import policies, readme_tables
from benchmarks.kept_runs import same_run
from benchmarks.policies import (
    EVERYBODY,
    FAMILIES,
    KINDS,
    PROMPT,
    RECIPES,
    acting,
    closed,
    planned,
    read_earlier,
    recipes_in,
    summary,
    variants,
)
from benchmarks.text_population import ROOT
from fssa_runtime.conditioning.layout import ModulatorConfig, RowLayout
from fssa_runtime.conditioning.modulator import Modulator
from fssa_runtime.errors import InputError
from fssa_runtime.integrations.modules import ModelShape
from fssa_runtime.training.policy_recipe import PolicyConfig
from fssa_runtime.training.reward_model import WEIGHTS_FILE
from fssa_runtime.training.trainer import load_config

COMMITTED = ROOT / "benchmarks" / "results" / "cpu" / "policies.json"


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


def test_three_seeds_have_a_mean_and_an_error() -> None:
    """Floor 0.5, ceiling 0.9: of the gap 0.25, 0.5 and 0.75, and 0.5 with an error in all."""
    by_seed = {}
    for seed, accuracy in enumerate((0.6, 0.7, 0.8)):
        by_seed[seed] = {
            "NP-DPO, gated": measured(dict.fromkeys(KINDS, accuracy)),
            EVERYBODY: measured(dict.fromkeys(KINDS, 0.5)),
            **{f"DPO, {kind}": measured({kind: 0.9}) for kind in KINDS},
        }
    found = summary(by_seed)
    assert set(found) == set(by_seed[0])
    error = 0.1 / 3**0.5
    ours = found["NP-DPO, gated"]
    assert ours["mean"]["0"]["accuracy"] == pytest.approx({"mean": 0.7, "standard_error": error})
    assert ours["gap_closed"]["0"] == pytest.approx({"mean": 0.5, "standard_error": error / 0.4})
    assert "gap_closed" not in found[EVERYBODY]
    assert summary({0: by_seed[0]})["NP-DPO, gated"]["gap_closed"]["0"]["standard_error"] is None


def test_a_policy_counts_by_its_seeds_that_have_floor_and_ceilings() -> None:
    bounds = {
        EVERYBODY: measured(dict.fromkeys(KINDS, 0.5)),
        **{f"DPO, {kind}": measured({kind: 0.9}) for kind in KINDS},
    }
    low, high = (measured(dict.fromkeys(KINDS, accuracy)) for accuracy in (0.6, 0.8))
    found = summary(
        {
            1: bounds | {"NP-DPO, gated": low},
            2: bounds | {"NP-DPO, gated": high, "NP-DPO, core": high},
            5: {"NP-DPO, gated": high, "NP-DPO, film": high, EVERYBODY: bounds[EVERYBODY]},
        }
    )
    assert set(found) == {*bounds, "NP-DPO, gated", "NP-DPO, core"}
    assert [found[name]["seeds"] for name in (EVERYBODY, "NP-DPO, gated")] == [[1, 2], [1, 2]]
    assert found["NP-DPO, gated"]["gap_closed"]["0"]["mean"] == pytest.approx(0.5)
    assert found["NP-DPO, core"]["seeds"] == [2]
    assert found["NP-DPO, core"]["gap_closed"]["0"]["mean"] == pytest.approx(0.75)
    assert summary({0: {"NP-DPO, gated": low}}) == {}


def test_families_are_compared_at_about_equal_numbers_stored_a_user() -> None:
    every = variants(load_config(RECIPES / "policy.yaml", PolicyConfig))
    model = ModelShape(30, 576, (576, 192, 192), (1536, 1536))
    sizes = {}
    for name in FAMILIES:
        modulator = every[name].modulator
        assert modulator is not None
        sizes[name] = RowLayout(modulator, model).generated_width
    assert sizes.pop("NP-DPO, film") == 2 * 576 * 30  # the paper's: every block
    assert max(sizes.values()) < 1.03 * min(sizes.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_that_act_are_those_whose_factors_are_not_zero(name: str) -> None:
    """Counted in a small model's modulator: a row of A for every number of gated, for R of core."""
    config = ModulatorConfig(latent_dim=2, families=[FAMILIES[name] | {"layers": [0, 2]}])
    modulator = Modulator(config, ModelShape(3, 24, (24, 8, 8), (40, 40)))
    counted = 0
    for site in modulator.layout.sites:
        if site.family == "film":
            counted += site.width
        else:
            rows_of_a = modulator.stacked(site)[0].count_nonzero(dim=1).count_nonzero()
            counted += int(rows_of_a) * (site.rank if site.family == "core" else 1)
    assert acting(name, modulator.layout.generated_width) == counted


def test_the_readme_table_tells_the_numbers_that_act() -> None:
    shown = {line.split(" | ")[0]: line for line in readme_tables.policies().splitlines()}
    assert "| 2310, 1650 |" in shown["| NP-DPO, gated, %"]
    assert "| 2352, 1680 |" in shown["| NP-DPO, core, %"]
    assert "| 2304, 2304 |" in shown["| NP-DPO, film, two blocks, %"]


def test_a_run_is_read_only_if_its_recipe_is_the_same(tmp_path: Path) -> None:
    every = variants(load_config(RECIPES / "policy.yaml", PolicyConfig))
    assert set(every) == {*FAMILIES, EVERYBODY, *(f"DPO, {kind}" for kind in KINDS), PROMPT}
    config = every[EVERYBODY]
    wanted, metrics = planned(config, tmp_path, seed=3)
    assert metrics is None
    assert wanted.train.seed == 3
    record = {"recipe": wanted.model_dump(mode="json"), "heldout": {}}
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    assert planned(config, tmp_path, seed=3)[1] == record
    assert planned(config, tmp_path, seed=4)[1] is None
    assert planned(every["DPO, length+"], tmp_path, seed=3)[1] is None


def test_a_run_is_resumed_only_by_its_own_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = variants(load_config(RECIPES / "policy.yaml", PolicyConfig))
    fresh, _ = planned(every[EVERYBODY], tmp_path, seed=3)
    assert (fresh.train.resume, fresh.train.overwrite) == (False, True)

    class Cut(Exception):
        pass

    def cut_off(*_: object) -> None:
        raise Cut

    monkeypatch.setattr(policies, "train_policy", cut_off)
    with pytest.raises(Cut):
        policies.train(fresh, None)  # type: ignore[arg-type]
    again, metrics = planned(every[EVERYBODY], tmp_path, seed=3)
    assert metrics is None
    assert (again.train.resume, again.train.overwrite) == (True, False)
    other, _ = planned(every["DPO, length+"], tmp_path, seed=3)
    assert (other.train.resume, other.train.overwrite) == (False, True)


def from_encoder(folder: Path, weights: bytes) -> PolicyConfig:
    """A conditioned policy's recipe, the weights of whose encoder's reward are these."""
    folder.mkdir(exist_ok=True)
    (folder / WEIGHTS_FILE).write_bytes(weights)
    config = variants(load_config(RECIPES / "policy.yaml", PolicyConfig))["NP-DPO, gated"]
    files = folder / "preferences.jsonl"
    files.write_bytes(b"")
    data = config.data.model_copy(update={"files": (files,)})
    return config.model_copy(update={"init_encoder": folder, "data": data})


def test_a_run_from_another_encoder_is_neither_read_nor_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, run = tmp_path / "reward", tmp_path / "run"
    config = from_encoder(encoder, b"one")

    def train_policy(trained: PolicyConfig, _: object) -> SimpleNamespace:
        if (run / "cut").exists():
            raise KeyboardInterrupt
        return SimpleNamespace(metrics={"recipe": trained.model_dump(mode="json"), "heldout": 1})

    monkeypatch.setattr(policies, "train_policy", train_policy)
    run.mkdir()
    (run / "cut").touch()
    with pytest.raises(KeyboardInterrupt):
        policies.train(planned(config, run, 3)[0], None)  # type: ignore[arg-type]
    assert planned(config, run, 3)[0].train.resume
    from_encoder(encoder, b"two")
    assert planned(config, run, 3)[0].train.overwrite
    from_encoder(encoder, b"one")
    (run / "cut").unlink()
    resumed, _ = planned(config, run, 3)
    metrics = policies.train(resumed, None)  # type: ignore[arg-type]
    assert planned(config, run, 3)[1] == metrics
    assert capsys.readouterr().out == ""
    from_encoder(encoder, b"two")
    again, metrics = planned(config, run, 3)
    assert metrics is None
    assert (again.train.resume, again.train.overwrite) == (False, True)


def test_a_run_whose_encoder_was_not_recorded_is_read_and_resumed_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = from_encoder(tmp_path / "reward", b"one")
    started, _ = planned(config, tmp_path, 3)
    recipe = started.model_dump(mode="json")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    resumed, _ = planned(config, tmp_path, 3)
    assert resumed.train.resume
    said = f"{tmp_path}: not known whether its data and initial encoder changed"
    assert said in capsys.readouterr().out
    metrics = {"recipe": recipe, "heldout": 1}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert planned(config, tmp_path, 3)[1] == metrics
    assert said in capsys.readouterr().out
    # What it began with is as unknown once it has gone on to its end.
    monkeypatch.setattr(policies, "train_policy", lambda *_: SimpleNamespace(metrics=metrics))
    policies.train(resumed, None)  # type: ignore[arg-type]
    from_encoder(tmp_path / "reward", b"two")
    assert planned(config, tmp_path, 3)[1] is not None
    assert said in capsys.readouterr().out


def test_conditioned_policies_see_every_kind_as_often_as_its_own_policy_does() -> None:
    every = variants(load_config(RECIPES / "policy.yaml", PolicyConfig))
    dedicated = {every[f"DPO, {kind}"].train.steps for kind in KINDS}
    assert {every[name].train.steps for name in FAMILIES} == {len(KINDS) * dedicated.pop()}
    assert not dedicated


def test_an_earlier_result_stands_in_for_what_the_folder_of_runs_lacks(tmp_path: Path) -> None:
    assert read_earlier(None) == ({}, {})
    file = tmp_path / "policies.json"
    result = {"seeds": "0,2", "runs": [{"a": 1}, {"a": 2}], "rewards": {"b": 3}}
    file.write_text(json.dumps(result))
    assert read_earlier(file) == ({0: {"a": 1}, 2: {"a": 2}}, {"b": 3})
    for content in ("{}", "[]", "not JSON", json.dumps(result | {"seeds": "0"})):
        file.write_text(content)
        with pytest.raises(InputError, match="--earlier"):
            read_earlier(file)
    with pytest.raises(InputError, match="no_such_file"):
        read_earlier(tmp_path / "no_such_file")


def test_what_an_earlier_result_has_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = json.loads(COMMITTED.read_text())
    lacking = earlier["runs"][0].pop("DPO, lists-")
    trained = []

    def train(config: PolicyConfig, _: object) -> dict:
        trained.append(config.data.mode)
        return {"heldout": lacking, "train_seconds": 1.0}

    model = SimpleNamespace(
        decoder=SimpleNamespace(config=ModelShape(30, 576, (576, 192, 192), (1536, 1536)))
    )
    monkeypatch.setattr(policies, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(policies, "make_choices", lambda *_: None)
    monkeypatch.setattr(policies, "train", train)
    monkeypatch.setattr(policies.LanguageModel, "load", lambda *_, **__: model)
    source, target = tmp_path / "earlier.json", tmp_path / "new.json"
    source.write_text(json.dumps(earlier | {"seeds": "0", "runs": earlier["runs"][:1]}))
    only = ["--only", EVERYBODY, "--only", "DPO, lists-"]
    command = ["policies", "--seeds", "0", *only, "--earlier", str(source), "--json", str(target)]
    monkeypatch.setattr("sys.argv", command)
    assert policies.main() == 0
    assert trained == ["lists-"]
    runs = json.loads(target.read_text())["runs"][0]
    assert runs[EVERYBODY] == earlier["runs"][0][EVERYBODY]
    assert runs["DPO, lists-"]["train_seconds"] == 1.0


def test_policies_begin_with_a_reward_that_reads_in_their_dtype() -> None:
    (own_reward, own), (reward, policy) = recipes_in(None), recipes_in("float32")
    assert own_reward.options is not None
    assert reward.options is not None
    assert (own_reward.options.dtype, own.dtype) == ("bfloat16", "bfloat16")
    assert (reward.options.dtype, policy.dtype) == ("float32", "float32")
    assert own.init_encoder == own_reward.train.output_dir
    assert policy.init_encoder == reward.train.output_dir != own.init_encoder
    # Nothing else differs, and a run that begins with the other's encoder is another run.
    changed = {"options": own_reward.options, "train": own_reward.train}
    assert reward.model_copy(update=changed) == own_reward
    changed = {"dtype": own.dtype, "init_encoder": own.init_encoder}
    assert policy.model_copy(update=changed) == own
    recorded = own.model_dump(mode="json") | {"dtype": "float32"}
    assert not same_run({"recipe": recorded}, policy)
    assert recipes_in("bfloat16") == (own_reward, own)
