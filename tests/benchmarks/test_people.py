"""The tables of real people: how rows become choices, and the logit's predictions by hand."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import people
from benchmarks.people import POOLED, POPULATION, POSTERIOR, over_folds, predictors
from benchmarks.people_data import FEATURES, find_table, write_choices
from benchmarks.rewards import gap_closed, mean_and_error, over_seeds
from fssa_runtime.training.choices import read_choices, split_users
from fssa_runtime.training.reward_recipe import RewardConfig
from fssa_runtime.training.tasks import OptionTask, collate_options
from fssa_runtime.training.trainer import load_config

SWISSMETRO = """\
ID,GA,TRAIN_AV,CAR_AV,SM_AV,TRAIN_TT,TRAIN_CO,TRAIN_HE,SM_TT,SM_CO,SM_HE,SM_SEATS,CAR_TT,CAR_CO,CHOICE
1,0,1,1,1,120,48,30,60,52,20,0,117,65,2
1,1,1,0,1,120,4800,30,60,52,20,1,0,0,1
2,0,1,1,1,120,48,30,60,52,20,1,117,65,0
2,0,1,1,1,120,48,30,60,52,20,1,117,65,3
"""
ELECTRICITY = """\
"choice","id","alt","pf","cl","loc","wk","tod","seas","chid"
FALSE,1,1,7,5,0,1,0,0,1
TRUE,1,2,9,1,1,0,0,0,1
TRUE,1,1,7,5,0,1,0,0,2
FALSE,1,2,0,5,0,1,1,0,2
"""


def converted(tmp_path, name, text):
    table, output = tmp_path / f"{name}.csv", tmp_path / f"{name}.jsonl"
    table.write_text(text)
    count = write_choices(name, find_table(name, table), output)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == count
    data = read_choices([output])
    assert data.chosen.shape == (count, len(FEATURES[name]))
    return records


def test_swissmetro_rows(tmp_path):
    first, second, third = converted(tmp_path, "swissmetro", SWISSMETRO)
    train = [0, 0, 2.0, 0.48, 0.5, 0]
    swissmetro = [1, 0, 1.0, 0.52, pytest.approx(1 / 3), 0]
    car = [0, 1, 1.95, 0.65, 0, 0]
    assert first == {"user": "1", "options": [train, swissmetro, car], "chosen": 1}
    # An annual ticket: no fares. No car. The train is chosen; airline seats on board.
    assert second["options"] == [
        [0, 0, 2.0, 0, 0.5, 0],
        [1, 0, 1.0, 0, pytest.approx(1 / 3), 1],
    ]
    assert second["chosen"] == 0
    # The third row has no answer and is left out.
    assert (third["user"], third["chosen"]) == ("2", 2)


def test_electricity_rows(tmp_path):
    first, second = converted(tmp_path, "electricity", ELECTRICITY)
    assert first == {
        "user": "1",
        "options": [[7, 5, 0, 1, 0, 0], [9, 1, 1, 0, 0, 0]],
        "chosen": 1,
    }
    assert second["chosen"] == 0


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        find_table("electricity", tmp_path / "absent.csv")


def test_logit_predictions_by_hand():
    """One feature. The posterior is that of the two-sided draws weighed by one choice."""
    logits = {"multinomial": {"mean": [0.5]}, "mixed": {"mean": [0.0], "std": [2.0]}}
    task = OptionTask(
        "u", "", torch.tensor([[1.0]]), torch.tensor([[[0.0], [9.0]]]),
        torch.tensor([[1.0]]), torch.tensor([[[0.0], [-1.0]]]),
        torch.tensor([[True, False]]), torch.tensor([[True, True]]),
    )  # fmt: skip
    batch = collate_options([task])
    p = {name: score(batch).log_probs[0, 0].exp() for name, score in predictors(logits).items()}
    weights = [math.exp(0.5 * x) for x in (1, 0, -1)]
    expected = torch.tensor([w / sum(weights) for w in weights])
    torch.testing.assert_close(p[POOLED], expected)

    beta = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    density = torch.exp(-0.5 * (beta / 2) ** 2)
    target = torch.softmax(beta[:, None] * torch.tensor([1.0, 0.0, -1.0]), -1)
    prior = (density[:, None] * target).sum(0) / density.sum()
    weighed = density * torch.sigmoid(beta)
    posterior = (weighed[:, None] * target).sum(0) / weighed.sum()
    torch.testing.assert_close(p[POPULATION].double(), prior, rtol=0, atol=0.02)
    torch.testing.assert_close(p[POSTERIOR].double(), posterior, rtol=0, atol=0.02)
    assert abs(p[POSTERIOR][0] - p[POPULATION][0]) > 0.1


def test_means_over_folds_and_seeds():
    def entry(nll):
        return {"nll": nll, "accuracy": 0.5, "calibration_error": 0.0}

    folds = [
        {"contexts": {"0": {"NP-BTL": entry(0.7), "other": entry(0.9)}}},
        {"contexts": {"0": {"NP-BTL": entry(0.5), "other": entry(0.9)}}},
    ]
    found = over_folds(folds)["0"]
    assert found["NP-BTL"]["nll"]["mean"] == pytest.approx(0.6)
    difference = found["other"]["np_btl_nll_minus_this"]
    assert difference == {
        "mean": pytest.approx(-0.3),
        "standard_error": pytest.approx(0.1),
    }
    assert mean_and_error([1.0]) == {"mean": 1.0, "standard_error": None}
    assert mean_and_error([None, None]) == {"mean": None, "standard_error": None}

    run = {
        "accuracy": 0.8,
        "nll": 0.4,
        "bayes_accuracy": 0.85,
        "bayes_nll": 0.3,
        "bayes_accuracy_same_tasks": 0.84,
        "bayes_nll_same_tasks": 0.31,
        "modes": {"0": {"accuracy": 0.7}},
    }
    means = over_seeds([{"heldout": {"contexts": {"3": run}}}])["3"]
    assert means["accuracy_minus_bayes"]["mean"] == pytest.approx(-0.05)
    assert means["nll_minus_bayes_same_tasks"]["mean"] == pytest.approx(0.09)
    assert means["accuracy_of_mode_0"]["mean"] == 0.7


def test_gap_closed_by_hand():
    def model(**accuracy):
        contexts = {n[1:]: {"accuracy": a} for n, a in accuracy.items()}
        return {"mean": contexts, "runs": [{"heldout": {"contexts": contexts}}]}

    models = {
        "NP-BTL": model(n0=0.7, n5=0.85),
        "BTL": model(n0=0.7),
        "dedicated to kind 0": model(n0=0.92),
        "dedicated to kind 1": model(n0=0.88),
    }
    found = gap_closed(models)
    assert found["0"]["mean"] == pytest.approx(0)
    assert found["5"]["mean"] == pytest.approx(0.75)


def fold_of_ten_people(tmp_path, fold):
    """Nine choices of each; the train takes longer the higher a person's number is."""
    header, first, *_ = SWISSMETRO.splitlines()
    rows = [
        f"{user}{first[1:-1]}{1 + n % 3}".replace(",120,", f",12{user},")
        for user in range(10)
        for n in range(9)
    ]
    converted(tmp_path, "swissmetro", "\n".join([header, *rows, ""]))
    recipe = load_config(people.RECIPES / "swissmetro.yaml", RewardConfig)
    return people.of_fold(recipe, tmp_path / "swissmetro.jsonl", fold, 0, tmp_path / "runs")


def test_the_logits_are_estimated_on_the_training_people(tmp_path):
    """An interpreter that estimates nothing keeps what it was given."""
    python, kept = tmp_path / "python", tmp_path / "kept.npz"
    python.write_text(f"#!/bin/sh\ncp \"$3\" {kept}\necho '{{\"draws\": '$5'}}'\n")
    python.chmod(0o755)
    config = fold_of_ten_people(tmp_path, 1)
    (path,) = config.data.files
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for takes_the_train in records[::3]:
        takes_the_train["options"].pop()  # and has no car
    path.write_text("\n".join(map(json.dumps, records)))
    assert people.estimated(config, python, 7) == {"draws": 7}
    data = read_choices([path])
    train, heldout = split_users(data, num_folds=config.data.num_folds, fold=1, seed=0)
    given = np.load(kept)
    assert given["persons"].tolist() == [data.users[row] for row in train]
    assert not {data.users[row] for row in heldout} & set(given["persons"])
    assert np.array_equal(given["options"][:, 0], data.chosen[train])
    assert np.array_equal(given["options"][:, 1:], data.rejected[train])
    assert np.array_equal(given["available"][:, 1:], data.mask[train])
    assert given["available"][:, 0].all()


@pytest.fixture
def fold(tmp_path, monkeypatch):
    """A recipe for one fold, the file of its choices, and what `people.measure` calls to measure
    it, which does nothing."""
    config = fold_of_ten_people(tmp_path, 0)
    config.train.output_dir.mkdir(parents=True)
    metrics = {"recipe": config.model_dump(mode="json")}
    contexts = {str(n): {} for n in config.evaluation.contexts}
    calls = []

    def train_reward(_):
        calls.append("NP-BTL")
        return SimpleNamespace(metrics=metrics | {"heldout": {"contexts": contexts}})

    def estimated(*_):
        calls.append("logit")
        same = [0.0] * len(FEATURES["swissmetro"])
        return {"draws": 7, "multinomial": {"mean": same}, "mixed": {"mean": same, "std": same}}

    monkeypatch.setattr(people, "train_reward", train_reward)
    monkeypatch.setattr(people, "estimated", estimated)
    return SimpleNamespace(config=config, choices=config.data.files[0], calls=calls)


def test_a_fold_that_was_measured_is_read_and_not_repeated(fold):
    found = people.measure(fold.config, Path("python"), 7)
    assert found["contexts"]["0"][POOLED]["nll"] == pytest.approx(math.log(3))
    assert "output_dir" not in found["np_btl"]["recipe"]["train"]
    assert people.measure(fold.config, Path("python"), 7) == found
    assert fold.calls == ["NP-BTL", "logit"]
    people.measure(fold.config, Path("python"), 8)
    assert fold.calls[2:] == ["logit"]


def test_a_fold_is_measured_anew_on_other_choices(fold):
    people.measure(fold.config, Path("python"), 7)
    fold.choices.write_text("".join(fold.choices.read_text().splitlines(True)[:-1]))
    people.measure(fold.config, Path("python"), 7)
    assert fold.calls[2:] == ["NP-BTL", "logit"]


def test_a_fold_whose_choices_were_not_recorded_is_read_and_that_is_said(fold, capsys):
    people.measure(fold.config, Path("python"), 7)
    assert capsys.readouterr().out == ""
    kept = fold.config.train.output_dir / people.FOLD_FILE
    found = json.loads(kept.read_text())
    del found["np_btl"]["inputs"]
    kept.write_text(json.dumps(found))
    fold.choices.write_text("")
    people.measure(fold.config, Path("python"), 7)
    assert fold.calls == ["NP-BTL", "logit"]
    assert "not known whether its data changed" in capsys.readouterr().out
