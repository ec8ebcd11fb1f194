"""Training rewards: the synthetic task is learnt, a resumed run is the same run."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from fssa_runtime.training import reward
from fssa_runtime.training.reward import RewardConfig, load_reward, train_reward
from fssa_runtime.training.trainer import METRICS_FILE, latest_checkpoint

from .reward_recipes import small_recipe


def test_np_btl_learns_what_btl_cannot(tmp_path):
    """Floors a little under the full recipe's; without conditioning every n stays at 75 %."""
    result = train_reward(RewardConfig.model_validate(small_recipe(tmp_path / "np")))
    by_n = result.metrics["heldout"]["contexts"]
    accuracy = {int(n): entry["accuracy"] for n, entry in by_n.items()}
    for n, floor in {0: 0.74, 1: 0.85, 3: 0.94, 5: 0.97, 10: 0.985}.items():
        assert accuracy[n] >= floor, accuracy
    assert by_n["0"]["active_latent_units"] == 0
    assert by_n["5"]["active_latent_units"] > 0
    # No predictor beats the limit on the same tasks; more would mean that targets leak.
    for entry in by_n.values():
        assert entry["accuracy"] <= entry["bayes_accuracy_same_tasks"] + 2 * entry["accuracy_se"]
    assert json.loads((tmp_path / "np" / "metrics.json").read_text()) == json.loads(
        json.dumps(result.metrics)
    )

    recipe = small_recipe(tmp_path / "btl", model="btl")
    del recipe["encoder"]
    recipe["train"]["steps"] = 60
    flat = train_reward(RewardConfig.model_validate(recipe)).metrics["heldout"]["contexts"]
    for n, entry in flat.items():
        assert 0.74 < entry["accuracy"] < 0.76, (n, entry["accuracy"])
        assert entry["active_latent_units"] is None


def test_stochastic_encoder_learns(tmp_path):
    """At correlation -1 every pair is a conflict: one choice tells all, none tells nothing."""
    recipe = small_recipe(
        tmp_path,
        encoder={"stochastic": True},
        data={"population": "normal", "rho": -1.0},
        evaluation={"contexts": [0, 1, 3], "num_tasks": 500},
    )
    recipe["train"] |= {"steps": 100, "warmup_steps": 10, "tasks_per_batch": 64}
    result = train_reward(RewardConfig.model_validate(recipe))
    by_n = result.metrics["heldout"]["contexts"]
    assert by_n["0"]["accuracy"] == pytest.approx(0.5, abs=0.05)
    assert by_n["1"]["accuracy"] > 0.85
    assert by_n["3"]["accuracy"] > 0.9
    assert all("kl" in entry for entry in result.fit.history)


def test_marginal_objective_reaches_the_likelihood_a_single_latent_cannot(tmp_path):
    """At correlation -1 nothing is known at n = 0 and everything at n = 1: NLL ln 2, then 0."""
    recipe = small_recipe(
        tmp_path,
        encoder={"stochastic": True, "latent_dim": 4},
        objective="marginal",
        num_samples=8,
        data={"population": "normal", "rho": -1.0},
        evaluation={
            "contexts": [0, 1, 3],
            "num_tasks": 400,
            "num_samples": 16,
            "identification": True,
        },
    )
    recipe["train"] |= {"steps": 150, "tasks_per_batch": 32, "learning_rate": 4e-3}
    by_n = train_reward(RewardConfig.model_validate(recipe)).metrics["heldout"]["contexts"]
    assert by_n["0"]["nll"] == pytest.approx(by_n["0"]["bayes_nll"], abs=0.05)
    assert by_n["1"]["nll"] < 0.25
    assert by_n["0"]["identification_error"] == pytest.approx(0.5, abs=0.03)
    # Every pair is a conflict here.
    for entry in by_n.values():
        assert entry["identification_error"] == pytest.approx(1 - entry["accuracy"])
    assert by_n["1"]["bayes_identification_error"] == 0


def unconditioned(folder, **changes):
    recipe = small_recipe(folder, **changes)
    del recipe["encoder"]
    recipe["train"] |= {"steps": 100, "tasks_per_batch": 32, "learning_rate": 4e-3}
    recipe["evaluation"] |= {"contexts": [0, 3], "num_tasks": 400}
    return train_reward(RewardConfig.model_validate(recipe)).metrics["heldout"]["contexts"]


def test_dedicated_models_know_their_kind(tmp_path):
    for mode in (0, 1):
        by_n = unconditioned(
            tmp_path / str(mode), model="btl", data={"kind": "synthetic", "mode": mode}
        )
        assert set(by_n["0"]["modes"]) == {str(mode)}
        assert by_n["0"]["accuracy"] > 0.98
        assert "bayes_accuracy" not in by_n["0"], "the limit is of both kinds together"


def test_distributional_baseline_is_no_better_but_less_sure(tmp_path):
    by_n = unconditioned(tmp_path / "dpl", model="dpl")
    assert by_n["3"]["accuracy"] == pytest.approx(0.75, abs=0.02)
    flat = unconditioned(tmp_path / "btl", model="btl")
    assert by_n["3"]["nll"] < flat["3"]["nll"] + 0.01


def test_choices_among_three_tell_more_than_pairs(tmp_path):
    recipe = small_recipe(
        tmp_path, data={"num_options": 3}, evaluation={"contexts": [0, 3], "num_tasks": 400}
    )
    recipe["train"] |= {"steps": 150, "tasks_per_batch": 64, "learning_rate": 4e-3}
    by_n = train_reward(RewardConfig.model_validate(recipe)).metrics["heldout"]["contexts"]
    assert by_n["3"]["accuracy"] > 0.9 > by_n["0"]["accuracy"]
    for entry in by_n.values():
        assert entry["accuracy"] <= entry["bayes_accuracy_same_tasks"] + 2 * entry["accuracy_se"]
        assert "bayes_accuracy" not in entry, "the closed formula is for pairs"


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def tiny_recipe(folder, **train):
    recipe = small_recipe(folder, encoder={"stochastic": True, "aggregate": "attention"})
    recipe["train"] |= {"steps": 20, "tasks_per_batch": 8, "save_every": 5, "log_every": 5, **train}
    recipe["evaluation"] |= {"num_tasks": 10, "contexts": [0, 3]}
    return RewardConfig.model_validate(recipe)


@pytest.mark.parametrize("gradient_accumulation", [1, 2])
def test_a_resumed_run_is_the_same_run(tmp_path, gradient_accumulation):
    """Stochastic, so that the state of the random numbers must be restored too."""
    train = {"gradient_accumulation": gradient_accumulation}
    straight = train_reward(tiny_recipe(tmp_path / "a", **train))
    with pytest.raises(KeyboardInterrupt):
        train_reward(tiny_recipe(tmp_path / "b", **train), callbacks=[StopAfter(12)])
    assert latest_checkpoint(tmp_path / "b").name == "checkpoint-10"
    resumed = train_reward(tiny_recipe(tmp_path / "b", resume=True, **train))
    assert (straight.fit.resumed_at, resumed.fit.resumed_at) == (0, 10)
    assert (straight.fit.steps, resumed.fit.steps) == (20, 20)
    expected, got = straight.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
    assert straight.metrics["heldout"] == resumed.metrics["heldout"]
    files = [load_file(tmp_path / run / "reward_model.safetensors") for run in "ab"]
    assert all(torch.equal(files[0][name], files[1][name]) for name in expected)

    again = train_reward(tiny_recipe(tmp_path / "b", resume=True, **train))
    assert again.fit.resumed_at == 20
    assert all(torch.equal(expected[k], v) for k, v in again.model.state_dict().items())


def test_what_was_trained_is_kept_though_measuring_fails(tmp_path, monkeypatch):
    """Nor do an earlier run's metrics stay, which are of other weights."""
    train_reward(tiny_recipe(tmp_path))
    measured = []

    def fail(model, *_):
        measured.append(model.state_dict())
        raise RuntimeError("no more memory")

    monkeypatch.setattr(reward, "evaluate_reward", fail)
    with pytest.raises(RuntimeError, match="no more memory"):
        train_reward(tiny_recipe(tmp_path, seed=1, overwrite=True))
    kept = load_reward(tmp_path).state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in measured[0].items())
    assert not (tmp_path / METRICS_FILE).exists()


def test_a_run_is_resumed_by_its_own_recipe_only(tmp_path):
    """The tensors fit whatever the objective was, or what they were trained on."""
    train_reward(tiny_recipe(tmp_path))
    resuming = tiny_recipe(tmp_path, resume=True)
    for change, message in (
        ({"kl_weight": 0.5}, r"kl_weight \(expected None, got 0.5\)"),
        ({"tasks": resuming.tasks.with_context(2)}, r"tasks.context_min \(expected 0, got 2\)"),
        (
            {"data": resuming.data.model_copy(update={"mode": 0})},
            r"data.mode \(expected None, got 0\)",
        ),
    ):
        with pytest.raises(ValueError, match=f"resume: .*{message}"):
            train_reward(resuming.model_copy(update=change))
    # An encoder that was left out, and one that is spelt out.
    train_reward(tiny_recipe(tmp_path / "plain").model_copy(update={"encoder": None}))
    spelt = tiny_recipe(tmp_path / "plain", resume=True)
    with pytest.raises(ValueError, match=r"resume: .*encoder \(expected None, got \.\.\.\)"):
        train_reward(spelt)
    # How it is measured does not decide what was learnt.
    measured = resuming.evaluation.model_copy(update={"num_tasks": 12})
    assert train_reward(resuming.model_copy(update={"evaluation": measured})).fit.resumed_at == 20


def test_mixed_precision_learns_the_same(tmp_path):
    """To bf16's rounding, and not by chance to the bit."""
    losses = {}
    for precision in ("no", "bf16"):
        recipe = tiny_recipe(tmp_path / precision, mixed_precision=precision)
        losses[precision] = [entry["loss"] for entry in train_reward(recipe).fit.history]
    assert losses["no"] != losses["bf16"]
    assert losses["bf16"] == pytest.approx(losses["no"], abs=0.02)
    with pytest.raises(ValueError, match="expected 'bf16' or 'no' on a CPU, got 'fp16'"):
        train_reward(tiny_recipe(tmp_path / "fp16", mixed_precision="fp16", device="cpu"))


@pytest.mark.parametrize("written", [None, 0, 100])
def test_an_incomplete_checkpoint_is_passed_over(tmp_path, written):
    """Cut off before its last file, or within that file after some bytes."""
    train_reward(tiny_recipe(tmp_path))
    last = tmp_path / "checkpoint-20" / "trainer_state.json"
    if written is None:
        last.unlink()
    else:
        last.write_bytes(last.read_bytes()[:written])
    assert latest_checkpoint(tmp_path).name == "checkpoint-15"
    assert train_reward(tiny_recipe(tmp_path, resume=True)).fit.resumed_at == 15


def test_earlier_runs_are_not_overwritten_by_accident(tmp_path):
    train_reward(tiny_recipe(tmp_path))
    with pytest.raises(ValueError, match=r"output_dir: .* with checkpoint-20; set resume: true"):
        train_reward(tiny_recipe(tmp_path))
    with pytest.raises(ValueError, match=r"resume: .* learning_rate \(expected 0.002, got 0.1\)"):
        train_reward(tiny_recipe(tmp_path, resume=True, learning_rate=0.1))
    resuming = tiny_recipe(tmp_path, resume=True)
    wider = resuming.model_copy(update={"hidden_dim": 64})
    with pytest.raises(ValueError, match=r"resume: .* hidden_dim \(expected 128, got 64\)"):
        train_reward(wider)
    (tmp_path / "train_settings.json").unlink()
    with pytest.raises(ValueError, match=r"is of another module: .* expected shape \(64"):
        train_reward(wider)
    train_reward(tiny_recipe(tmp_path, overwrite=True, steps=5))
    assert latest_checkpoint(tmp_path).name == "checkpoint-5"
