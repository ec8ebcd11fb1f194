"""Choices between options given by numbers: reading, refusing, and folds of users."""

import json

import numpy as np
import pytest
import torch

from fssa_runtime.training.choices import read_choices, split_users
from fssa_runtime.training.records import PreferenceError
from fssa_runtime.training.reward import RewardConfig, train_reward
from fssa_runtime.training.reward_sources import reward_source

GOOD = {"user": "u", "options": [[1, 2], [3.5, 4], [5, 6]], "chosen": 1}


def write(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def test_the_chosen_option_comes_first_and_padding_is_masked(tmp_path):
    path = write(
        tmp_path / "c.jsonl",
        GOOD,
        {"user": 7, "mode": "m", "options": [[0, 1], [2, 3]], "chosen": 0},
        {**GOOD, "chosen": 2},
    )
    data = read_choices([path])
    assert data.users == ("u", "7", "u")
    assert data.chosen.tolist() == [[3.5, 4], [0, 1], [5, 6]]
    assert data.rejected.tolist() == [[[1, 2], [5, 6]], [[2, 3], [0, 0]], [[1, 2], [3.5, 4]]]
    assert data.mask.tolist() == [[True, True], [True, False], [True, True]]
    assert data.mode_of_user == {"u": "", "7": "m"}
    assert data.rows_by_user["u"].tolist() == [0, 2]
    assert data.prompt_ids.tolist() == [0, 1, 2]
    assert data.question_ids.tolist() == [0, 1, 0]


BAD = [
    ({**GOOD, "options": [[1, 2]]}, "field 'options': expected a list of at least two"),
    ({**GOOD, "options": [[1, 2], [1]]}, "option 1: expected finite numbers .float32., as many as"),
    ({**GOOD, "options": [[1, 2], [1, True]]}, "option 1: expected finite numbers"),
    ({**GOOD, "options": [[1, 2], [1, float("nan")]]}, "option 1: expected finite numbers"),
    ({**GOOD, "options": [[1, 2], [1, -1e39]]}, r"option 1: .* \(float32\), .* got \[1, -1e\+39\]"),
    ({**GOOD, "options": [[1, 2], [1, 10**400]]}, "option 1: expected finite numbers"),
    ({**GOOD, "options": [[], []]}, "option 0: expected finite numbers"),
    ({**GOOD, "options": [[1], [2]]}, "expected vectors of length 2 as before, got 1"),
    ({**GOOD, "chosen": 3}, r"field 'chosen': expected 0\.\.2, got 3"),
    ({**GOOD, "chosen": True}, "field 'chosen': .* got true"),
    ({**GOOD, "mode": "x"}, "field 'mode': expected '' for user 'u' as before, got 'x'"),
    ({"user": "u", "chosen": 0}, "field 'options': expected, but fields are"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_a_bad_line_is_named(tmp_path, record, message):
    path = write(tmp_path / "c.jsonl", GOOD, record)
    with pytest.raises(PreferenceError, match=message) as caught:
        read_choices([path])
    assert str(caught.value).startswith(f"{path}:2: ")


def test_no_choice_at_all_is_refused(tmp_path):
    with pytest.raises(PreferenceError, match="expected at least one choice"):
        read_choices([write(tmp_path / "c.jsonl")])


def test_folds_hold_out_every_user_once(tmp_path):
    path = write(tmp_path / "c.jsonl", *({**GOOD, "user": i % 11} for i in range(40)))
    data = read_choices([path])
    seen = []
    for fold in range(3):
        train, heldout = split_users(data, num_folds=3, fold=fold, seed=5)
        inside = {data.users[row] for row in heldout}
        assert not inside & {data.users[row] for row in train}
        assert len(train) + len(heldout) == 40
        seen += inside
    assert sorted(seen) == sorted(set(data.users))
    again = split_users(data, num_folds=3, fold=0, seed=6)[1]
    assert set(again) != set(split_users(data, num_folds=3, fold=0, seed=5)[1])
    with pytest.raises(ValueError, match="num_folds: expected at most 11 users, got 12"):
        split_users(data, num_folds=12, fold=0, seed=0)


def logit_people(path, num_users=150, num_choices=12):
    """People who weigh the first of two features by their own +3 or -3, Luce's rule, among three
    options of which the last is not always there."""
    rng = np.random.default_rng(0)
    records = []
    for user in range(num_users):
        taste = np.array([3.0 if user % 2 else -3.0, 1.0])
        for choice in range(num_choices):
            options = rng.normal(size=(3 - choice % 2, 2))
            weights = np.exp(options @ taste)
            chosen = int(rng.choice(len(options), p=weights / weights.sum()))
            records.append({"user": user, "options": options.tolist(), "chosen": chosen})
    return write(path, *records)


def test_training_and_evaluation_see_their_own_people_alone(tmp_path):
    """The options' numbers say whose they are."""
    records = [
        {"user": user, "options": [[user, k] for k in range(2 + user % 2)], "chosen": 1}
        for user in range(9)
        for _ in range(3)
    ]
    path = write(tmp_path / "c.jsonl", *records)
    folds = {"num_folds": 3, "fold": 1}
    config = RewardConfig.model_validate(
        {
            "data": {"kind": "choices", "files": [str(path)], "split_seed": 5, **folds},
            "tasks": {"context_max": 0},
            "train": {"output_dir": str(tmp_path), "steps": 1, "tasks_per_batch": 99},
            "evaluation": {"num_tasks": 99},
        }
    )
    source = reward_source(config, None, None)
    rows = split_users(read_choices([path]), seed=5, **folds)
    train, heldout = ({float(records[row]["user"]) for row in of_side} for of_side in rows)

    def seen(tasks):
        return {user for task in tasks for user in task.target_chosen[:, 0].tolist()}

    assert seen(source.training) == train
    assert set(source.scaling_sample[:, 0].tolist()) == train
    assert seen(source.heldout(0)["heldout"]) == heldout


def test_a_taste_is_learnt_from_choices_among_several(tmp_path):
    path = logit_people(tmp_path / "c.jsonl")
    config = {
        "model": "np-btl",
        "head": "linear",
        "hidden_dim": 16,
        "data": {"kind": "choices", "files": [str(path)], "num_folds": 3},
        "encoder": {"latent_dim": 2, "hidden_dim": 32, "aggregate": "sum", "stochastic": True},
        "objective": "marginal",
        "num_samples": 8,
        "tasks": {"context_max": 6, "num_targets": 6},
        "train": {
            "output_dir": str(tmp_path / "np"),
            "steps": 200,
            "tasks_per_batch": 64,
            "learning_rate": 1e-2,
            "cpu_threads": 1,
            "save_every": 0,
            "progress": "off",
            "tensorboard": False,
        },
        "evaluation": {
            "contexts": [0, 5, 20],
            "num_tasks": 200,
            "num_targets": 6,
            "num_samples": 32,
        },
    }
    measured = train_reward(RewardConfig.model_validate(config)).metrics["heldout"]
    nll = {n: entry["nll"] for n, entry in measured["contexts"].items()}
    # The tastes cancel in the mean of the people: without choices little is known, with five most.
    assert 0.75 < nll["0"] < 0.9, nll
    assert nll["5"] < 0.4, nll
    assert measured["skipped_contexts"] == [20]

    for name in ("encoder", "objective", "num_samples"):
        del config[name]
    config |= {"model": "btl"}
    config["train"]["output_dir"] = str(tmp_path / "btl")
    config["evaluation"]["num_samples"] = 0
    flat = train_reward(RewardConfig.model_validate(config)).metrics["heldout"]["contexts"]
    assert flat["5"]["nll"] > 0.75
    assert torch.isfinite(torch.tensor(flat["0"]["nll"]))
