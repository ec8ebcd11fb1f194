"""Rewards from recorded preferences: new users, new prompts, choices among several answers."""

import json

import numpy as np
import pytest
import torch

from fssa_runtime.errors import InputError
from fssa_runtime.training.data import (
    Preference,
    PreferenceData,
    read_preferences,
    split_preferences,
)
from fssa_runtime.training.reward import (
    RewardConfig,
    embed_preferences,
    load_reward,
    train_reward,
)
from fssa_runtime.training.reward_sources import reward_source


def write_preferences(path, num_users=24, num_prompts=24):
    """Half of the users prefer the longer answer, half the shorter one."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for user in range(num_users):
            for prompt in range(num_prompts):
                short, long = sorted(rng.choice(40, 2, replace=False) + 1)
                chosen, rejected = ("x" * long, "x" * short)[:: 1 if user % 2 else -1]
                record = {"user": user, "mode": ["short", "long"][user % 2]}
                record |= {"prompt": f"p{prompt}", "chosen": chosen, "rejected": rejected}
                file.write(json.dumps(record) + "\n")
    return path


class FakeEmbedder:
    """Length on a scale like a language model's: far from zero, one feature huge, one constant."""

    def __init__(self):
        self.asked = []

    def __call__(self, options):
        self.asked += options
        lengths = torch.tensor([float(len(completion)) for _, completion in options])
        return torch.stack([1e-3 * lengths + 5, 1e4 * lengths, torch.full_like(lengths, 3)], 1)


def preference_recipe(folder, path, **train):
    return RewardConfig.model_validate(
        {
            "hidden_dim": 32,
            "data": {"kind": "preferences", "files": [str(path)], "heldout_prompts": 0.5},
            "tasks": {"context_max": 6, "num_targets": 8, "disjoint_by": "prompt"},
            "encoder": {"hidden_dim": 32, "latent_dim": 8},
            "train": {
                "output_dir": str(folder),
                "steps": 200,
                "tasks_per_batch": 32,
                "learning_rate": 3e-3,
                "cpu_threads": 1,
                "save_every": 0,
                "progress": "off",
                "tensorboard": False,
                **train,
            },
            "evaluation": {"contexts": [0, 1, 6, 12], "num_tasks": 100, "num_targets": 5},
        }
    )


def test_embedded_preferences_are_learnt_for_new_users_and_prompts(tmp_path):
    path, embed = write_preferences(tmp_path / "p.jsonl"), FakeEmbedder()
    config = preference_recipe(tmp_path / "run", path)
    result = train_reward(config, embed=embed, embed_fingerprint="fake-1")
    for split in ("heldout", "known_users_new_prompts", "new_users_known_prompts"):
        by_n = result.metrics[split]["contexts"]
        assert 0.3 < by_n["0"]["accuracy"] < 0.7
        assert by_n["6"]["accuracy"] > 0.95
        assert by_n["6"]["worst_accuracy"] > 0.9
        assert set(by_n["6"]["modes"]) == {"long", "short"}
        # 12 prompts in each half: no user has 12 context choices and a target.
        assert result.metrics[split]["skipped_contexts"] == [12]
    assert len(embed.asked) == len(set(embed.asked)), "an option was embedded twice"

    restored = load_reward(tmp_path / "run")
    assert torch.equal(restored.scaler.mean, result.model.scaler.mean)

    # Same options and fingerprint: read back. Another fingerprint: embedded anew.
    again = FakeEmbedder()
    quick = preference_recipe(tmp_path / "run", path, steps=1)
    train_reward(quick, embed=again, embed_fingerprint="fake-1")
    assert again.asked == []
    train_reward(quick, embed=again, embed_fingerprint="fake-2")
    assert sorted(again.asked) == sorted(embed.asked)


def test_training_and_every_evaluation_see_their_rows_of_the_split_alone(tmp_path):
    """An option's vector says whose it is, and after which prompt."""
    path = tmp_path / "p.jsonl"
    asked = [(user, prompt) for user in range(10) for prompt in range(10)]
    with path.open("w") as file:
        for user, prompt in asked:
            record = {"user": user, "prompt": str(prompt)}
            record |= {"chosen": f"{user} well", "rejected": f"{user} badly"}
            file.write(json.dumps(record) + "\n")
    config = preference_recipe(tmp_path, path, steps=10)
    source = reward_source(
        config, lambda options: torch.tensor([[int(a[0]), float(p)] for p, a in options]), None
    )
    split = split_preferences(
        read_preferences(path), heldout_users=0.2, heldout_prompts=0.5, seed=0
    )

    def seen(tasks):
        kinds = ("context_chosen", "context_rejected", "target_chosen", "target_rejected")
        return {tuple(o) for task in tasks for kind in kinds for o in getattr(task, kind).tolist()}

    train = {asked[row] for row in split.train}
    assert seen(source.training) == train
    assert {tuple(option) for option in source.scaling_sample.tolist()} == train
    for name, tasks in source.heldout(2).items():
        assert seen(tasks) == {asked[row] for row in getattr(split, name)}, name


def test_bad_embeddings_are_refused(tmp_path):
    data = PreferenceData((Preference("u", "p", "a", "b"), Preference("u", "p", "c", "d")))
    with pytest.raises(ValueError, match=r"embed: expected \[4, 3\], got \(3, 3\)"):
        embed_preferences(data, lambda options: torch.zeros(len(options) - 1, 3))
    widths = iter([2, 1])
    with pytest.raises(ValueError, match=r"embed: expected \[2, 2\], got \(2, 1\)"):
        embed_preferences(
            data, lambda options: torch.zeros(len(options), next(widths)), batch_size=2
        )
    with pytest.raises(ValueError, match="embed: expected finite"):
        embed_preferences(data, lambda options: torch.full((len(options), 3), float("nan")))

    def up_to_ten_letters(options):
        if any(len(completion) > 10 for _, completion in options):
            raise InputError("an option is too long")
        return torch.zeros(len(options), 3)

    long = PreferenceData((*data.preferences, Preference("v", "q", "a", "b" * 11)))
    with pytest.raises(InputError, match="an answer to 'q', seen by user 'v': an option is too"):
        embed_preferences(long, up_to_ten_letters)
    with pytest.raises(ValueError, match="embed: expected a function"):
        train_reward(preference_recipe(tmp_path, write_preferences(tmp_path / "p.jsonl")))


def test_choices_among_several_answers_are_embedded_and_learnt(tmp_path):
    """The longest or the shortest of two or three answers."""
    rng, path = np.random.default_rng(0), tmp_path / "p.jsonl"
    with path.open("w") as file:
        for user in range(24):
            for prompt in range(24):
                lengths = sorted(rng.choice(40, 2 + prompt % 2, replace=False) + 1)
                *rejected, chosen = lengths if user % 2 else lengths[::-1]
                record = {"user": user, "mode": str(user % 2), "prompt": f"p{prompt}"}
                record |= {"chosen": "x" * chosen, "rejected": ["x" * n for n in rejected]}
                file.write(json.dumps(record) + "\n")
    embed = FakeEmbedder()
    config = preference_recipe(tmp_path / "run", path)
    by_n = train_reward(config, embed=embed).metrics["heldout"]["contexts"]
    assert by_n["6"]["accuracy"] > 0.95
    assert len(embed.asked) == len(set(embed.asked))

    data = config.data.model_copy(update={"mode": "1"})
    dedicated = config.model_copy(update={"model": "btl", "data": data})
    flat = train_reward(dedicated, embed=embed).metrics["heldout"]["contexts"]
    assert set(flat["0"]["modes"]) == {"1"}
    assert flat["0"]["accuracy"] > 0.95
    data = config.data.model_copy(update={"mode": "2"})
    with pytest.raises(ValueError, match=r"data.mode: expected one of \['0', '1'\], got '2'"):
        train_reward(config.model_copy(update={"data": data}), embed=embed)


def test_embeddings_of_choices_among_several_are_padded():
    data = PreferenceData(
        (Preference("u", "p", "a", "bb", "", ("ccc",)), Preference("u", "p", "bb", "a"))
    )
    table = embed_preferences(
        data, lambda options: torch.tensor([[float(len(answer))] for _, answer in options])
    )
    assert table.chosen.tolist() == [[1.0], [2.0]]
    assert table.rejected.tolist() == [[[2.0], [3.0]], [[1.0], [0.0]]]
    assert table.mask.tolist() == [[True, True], [True, False]]
