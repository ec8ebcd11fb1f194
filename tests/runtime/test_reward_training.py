"""Training: the synthetic task is learnt, a resumed run is the same run, checkpoints restore."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from fssa_runtime.conditioning.encoder import EncoderSettings
from fssa_runtime.training.data import Preference, PreferenceData
from fssa_runtime.training.evaluation import Scores, active_latent_units, evaluate
from fssa_runtime.training.losses import btl_loss, kl_diagonal_gaussians
from fssa_runtime.training.reward import (
    RewardConfig,
    embed_preferences,
    load_reward,
    save_reward,
    train_reward,
)
from fssa_runtime.training.reward_model import RewardModel, RewardModelConfig, RewardObjective
from fssa_runtime.training.synthetic import Population, SyntheticTasks
from fssa_runtime.training.tasks import OptionTask, TaskConfig, collate_options
from fssa_runtime.training.trainer import TrainSettings, fit, latest_checkpoint, load_config

RECIPE = Path(__file__).parents[2] / "recipes" / "synthetic.yaml"


def small_recipe(folder, **changes):
    """The shipped recipe, shortened to seconds."""
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["train"] |= {
        "output_dir": str(folder),
        "steps": 200,
        "warmup_steps": 20,
        "save_every": 0,
        "progress": "off",
        "tensorboard": False,
    }
    recipe["evaluation"]["num_tasks"] = 2000
    for name, value in changes.items():
        if isinstance(value, dict):
            recipe[name] = recipe.get(name, {}) | value
        else:
            recipe[name] = value
    return recipe


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


def test_an_incomplete_checkpoint_is_passed_over(tmp_path):
    train_reward(tiny_recipe(tmp_path))
    (tmp_path / "checkpoint-20" / "trainer_state.json").unlink()
    assert latest_checkpoint(tmp_path).name == "checkpoint-15"
    assert train_reward(tiny_recipe(tmp_path, resume=True)).fit.resumed_at == 15


def test_earlier_runs_are_not_overwritten_by_accident(tmp_path):
    train_reward(tiny_recipe(tmp_path))
    with pytest.raises(ValueError, match=r"output_dir: .* with checkpoint-20; set resume: true"):
        train_reward(tiny_recipe(tmp_path))
    with pytest.raises(ValueError, match=r"resume: .* learning_rate \(expected 0.002, got 0.1\)"):
        train_reward(tiny_recipe(tmp_path, resume=True, learning_rate=0.1))
    wider = tiny_recipe(tmp_path, resume=True).model_copy(update={"hidden_dim": 64})
    with pytest.raises(ValueError, match=r"is of another module: .* expected shape \(64"):
        train_reward(wider)
    train_reward(tiny_recipe(tmp_path, overwrite=True, steps=5))
    assert latest_checkpoint(tmp_path).name == "checkpoint-5"


class Numbers(Dataset):
    """Items 0, 1, 2, ... so that a module can record what it was given."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index


def collate_numbers(items):
    return {"numbers": torch.tensor(items)}


class Recorder(nn.Module):
    def __init__(self, fail_at=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen = []
        self.fail_at = fail_at

    def forward(self, numbers):
        self.seen.append(numbers.tolist())
        loss = self.weight * numbers.float().mean()
        if self.fail_at in numbers.tolist():
            loss = loss * float("nan")
        return {"loss": loss, "largest": numbers.max()}


def settings(folder, **changes):
    options = {
        "output_dir": folder,
        "steps": 3,
        "tasks_per_batch": 2,
        "save_every": 0,
        "log_every": 3,
        "progress": "off",
        "tensorboard": False,
    }
    return TrainSettings(**{**options, **changes})


def test_tasks_come_in_order_once_and_scalars_are_logged(tmp_path):
    module = Recorder()
    result = fit(module, Numbers(100), settings(tmp_path), collate=collate_numbers)
    assert module.seen == [[0, 1], [2, 3], [4, 5]]
    assert [entry["largest"] for entry in result.history] == [pytest.approx(3.0)]
    assert result.steps == 3


def test_optimiser_schedule_and_clipping(tmp_path):
    """Gradient accumulation, warm-up and decay by hand on one weight, with Adam's ±lr steps."""
    weights = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights.append(model.weight.item())

    chosen = settings(
        tmp_path,
        steps=4,
        warmup_steps=2,
        schedule="linear",
        learning_rate=0.1,
        gradient_accumulation=2,
    )
    fit(Recorder(), Numbers(16), chosen, collate=collate_numbers, callbacks=[Watch()])
    # Gradients are clipped to norm 1, so that each is the same and Adam moves by the rate.
    rates = [0.0, 0.05, 0.1, 0.05]
    assert weights == pytest.approx([1 - sum(rates[: i + 1]) for i in range(4)], abs=1e-4)


def test_a_non_finite_loss_stops_the_run(tmp_path):
    with pytest.raises(
        FloatingPointError, match="loss: expected a finite number, got nan in step 2"
    ):
        fit(Recorder(fail_at=3), Numbers(6), settings(tmp_path), collate=collate_numbers)


def test_too_few_tasks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dataset: expected at least 6 tasks for 3 steps, got 5"):
        fit(Recorder(), Numbers(5), settings(tmp_path), collate=collate_numbers)


def write_yaml(path, content):
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_the_shipped_recipe_loads():
    assert load_config(RECIPE, RewardConfig).train.steps > 0


BAD_RECIPES = [
    ({"train": {"steps": 0}}, "train.steps: .*greater than or equal to 1, got 0"),
    ({"train": {"step": 3}}, "train.step: Extra inputs are not permitted, got 3"),
    ({"encoder": {"aggregate": "max"}}, "encoder.aggregate: .*'mean', 'sum' or 'attention'"),
    ({"model": "np"}, "model: Input should be 'np-btl' or 'btl', got 'np'"),
    ({"model": "btl"}, "encoder: expected none for model 'btl'"),
    ({"kl_weight": 0.5}, "kl_weight: expected none unless encoder.stochastic"),
    ({"data": {"kind": "web"}}, "data: .*'kind'.*'synthetic', 'preferences'"),
    ({"data": {"rho": 0.5}}, "data.synthetic: .*rho: expected 0 for the interval"),
    ({"tasks": {"disjoint_by": "prompt"}}, "tasks.disjoint_by: expected 'pair' for synthetic"),
    ({"evaluation": {"contexts": []}}, "evaluation.contexts: .*at least 1 item"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_RECIPES)
def test_a_bad_recipe_names_file_and_field(tmp_path, changes, message):
    path = write_yaml(tmp_path / "bad.yaml", small_recipe(tmp_path, **changes))
    with pytest.raises(ValueError, match=message) as caught:
        load_config(path, RewardConfig)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["- 1\n", "a: [", "", "\x00"])
def test_what_is_not_a_recipe_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"bad\.yaml: expected"):
        load_config(write_yaml(tmp_path / "bad.yaml", content), RewardConfig)


MODELS = {
    "np-btl": RewardModelConfig(
        option_dim=2, hidden_dim=16, encoder=EncoderSettings(latent_dim=4, hidden_dim=16)
    ),
    "btl": RewardModelConfig(option_dim=2, hidden_dim=16, encoder=None),
}


def make_model(kind="np-btl", **encoder):
    torch.manual_seed(0)
    config = MODELS[kind]
    if encoder:
        settings = config.encoder.model_copy(update=encoder)
        config = config.model_copy(update={"encoder": settings})
    model = RewardModel(config)
    model.scaler.set_statistics(torch.tensor([0.5, -1.0]), torch.tensor([2.0, 3.0]))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def make_batch(population=None, count=6):
    tasks = SyntheticTasks(
        population or Population("normal"), TaskConfig(), num_tasks=count, seed=0
    )
    return collate_options(tasks.__getitems__(list(range(count))))


@pytest.mark.parametrize("kind", MODELS)
def test_a_checkpoint_restores_every_tensor_and_output(tmp_path, kind):
    model, batch = make_model(kind), make_batch()
    save_reward(model, tmp_path)
    restored = load_reward(tmp_path)
    state = model.state_dict()
    assert restored.state_dict().keys() == state.keys()
    assert {name for name, _ in model.named_parameters()} <= state.keys()
    assert any(name.endswith("scaler.mean") for name in state)
    for name, value in restored.state_dict().items():
        assert torch.equal(value, state[name]), name
    with torch.no_grad():
        assert torch.equal(restored(batch).margins, model(batch).margins)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "reward_config.json",
        "reward_model.safetensors",
    ]


def test_a_damaged_checkpoint_is_refused(tmp_path):
    save_reward(make_model(), tmp_path)
    weights, config = tmp_path / "reward_model.safetensors", tmp_path / "reward_config.json"
    record = json.loads(config.read_text())

    config.write_text(json.dumps({**record, "format_version": 99}))
    with pytest.raises(ValueError, match="'format_version': expected 1, got 99"):
        load_reward(tmp_path)
    config.write_text(json.dumps({**record, "model": {**record["model"], "depth": 2}}))
    with pytest.raises(ValueError, match="field 'model'"):
        load_reward(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"reward_config\.json: expected a JSON object"):
        load_reward(tmp_path)
    config.write_text(json.dumps(record))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"reward_model\.safetensors: expected sha256"):
        load_reward(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError):
        load_reward(tmp_path)


def test_reward_follows_formula_and_ignores_padding():
    model, batch = make_model(), make_batch()
    with torch.no_grad():
        margins, latents = model(batch)
        latent = model.encoder(
            batch["context_chosen"], batch["context_rejected"], batch["context_mask"]
        )
        assert torch.equal(latents, latent.mean)
        y = torch.cat([batch["target_chosen"][2, 3], batch["target_rejected"][2, 3]]).view(2, 2)
        scaled = (y - torch.tensor([0.5, -1.0])) / torch.tensor([2.0, 3.0])
        joint = torch.cat([model.option_encoder(scaled).relu(), latents[2].expand(2, 4)], -1)
        weight = torch.cat([model.head_option.weight, model.head_latent.weight], -1)
        hidden = (joint @ weight.T + model.head_option.bias).relu()
        chosen, rejected = model.head_out(hidden)[:, 0]
    torch.testing.assert_close(margins[2, 3], chosen - rejected)

    gradients = []
    for padding in (0.0, float("nan")):
        padded = {name: value.clone() for name, value in batch.items()}
        padded["target_mask"][:, 15:] = False
        padded["context_mask"][:, 5:] = False
        for name in ("target_chosen", "target_rejected"):
            padded[name][:, 15:] = padding
        for name in ("context_chosen", "context_rejected"):
            padded[name][:, 5:] = padding
        copy = make_model()
        RewardObjective(copy, 1.0)(**padded)["loss"].backward()
        gradients.append([parameter.grad for parameter in copy.parameters()])
    for clean, poisoned in zip(*gradients, strict=True):
        torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)


def test_latent_must_match_the_model():
    with pytest.raises(ValueError, match=r"z: expected \[U, Z\]"):
        make_model().rewards(torch.zeros(1, 1, 2), None)
    with pytest.raises(ValueError, match="z: expected None"):
        make_model("btl").rewards(torch.zeros(1, 1, 2), torch.zeros(1, 4))


def test_stochastic_loss_adds_the_kl_per_target():
    model, batch = make_model(stochastic=True), make_batch()
    batch["target_mask"][0, 10:] = False
    torch.manual_seed(5)
    outputs = RewardObjective(model, kl_weight=0.7)(**batch)
    torch.manual_seed(5)
    context, target = (
        model.encode(batch[f"{k}_chosen"], batch[f"{k}_rejected"], batch[f"{k}_mask"])
        for k in ("context", "target")
    )
    kl = kl_diagonal_gaussians(target.mean, target.log_std, context.mean, context.log_std)
    chosen, rejected = model.target_rewards(batch, target.rsample())
    nll = btl_loss(chosen, rejected, batch["target_mask"])
    expected = nll + 0.7 * kl.sum() / (5 * 20 + 10)
    torch.testing.assert_close(outputs["loss"], expected)
    torch.testing.assert_close(outputs["kl"], kl.mean())


def option_task(user, mode, m):
    empty, target = torch.zeros(0, 1), torch.zeros(m, 1)
    return OptionTask(user, mode, empty, empty, target, target)


def test_evaluation_by_hand():
    tasks = [option_task("a", "x", 2), option_task("b", "x", 1), option_task("c", "y", 1)]
    margins = torch.tensor([[1.0, -1.0], [2.0, 99.0], [0.0, float("nan")]])
    latents = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.05, 4.0]])
    batches = iter([slice(0, 2), slice(2, 3)])

    def score(batch):
        part = next(batches)
        return Scores(margins[part, : batch["target_mask"].shape[1]], latents[part])

    got = evaluate(score, {4: tasks}, collate=collate_options, batch_size=2)["contexts"]["4"]
    nll = np.log1p(np.exp([-1.0, 1.0, -2.0, 0.0]))
    assert got["accuracy"] == pytest.approx(2.5 / 4)
    assert got["nll"] == pytest.approx(nll.mean())
    assert (got["num_users"], got["num_tasks"], got["num_targets"]) == (3, 3, 4)
    x, y = got["modes"]["x"], got["modes"]["y"]
    assert (x["accuracy"], y["accuracy"]) == (pytest.approx(2 / 3), 0.5)
    # Clusters a (1 of 2) and b (1 of 1) around 2/3: residuals ∓1/3.
    assert x["accuracy_se"] == pytest.approx(np.sqrt(2 * (1 / 3) ** 2 * 2 / 1) / 3)
    assert y["accuracy_se"] is None
    assert got["accuracy_se"] is None
    assert (got["worst_mode"], got["worst_accuracy"]) == ("y", 0.5)
    assert (got["active_latent_units"], got["latent_dim"]) == (1, 2)
    json.dumps(got, allow_nan=False)


def test_standard_error_matches_the_spread_of_repetitions():
    """Users answer alike within themselves, so targets are far from independent."""
    rng = np.random.default_rng(0)
    estimates, errors = [], []
    for _ in range(300):
        right = rng.random(40) < 0.7
        margins = torch.tensor(np.where(right, 1.0, -1.0))[:, None].expand(-1, 5)
        tasks = [option_task(str(i // 2), "x", 5) for i in range(40)]
        margins = margins[torch.arange(40) // 2 * 2]
        entry = evaluate(
            lambda batch, m=margins: Scores(m, None), {0: tasks}, collate=collate_options
        )["contexts"]["0"]
        estimates.append(entry["accuracy"])
        errors.append(entry["accuracy_se"])
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.15)


def test_nan_margins_are_an_error():
    with pytest.raises(FloatingPointError, match="margins"):
        evaluate(
            lambda batch: Scores(torch.full((1, 2), float("nan")), None),
            {0: [option_task("a", "x", 2)]},
            collate=collate_options,
        )


def test_active_units_need_variance():
    latents = torch.zeros(100, 3)
    latents[:, 1] = torch.linspace(-1, 1, 100)
    latents[:, 2] = torch.linspace(-0.1, 0.1, 100)
    assert active_latent_units(latents) == 1
    assert active_latent_units(latents[:1]) == 0


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
    with pytest.raises(ValueError, match="embed: expected a function"):
        train_reward(preference_recipe(tmp_path, write_preferences(tmp_path / "p.jsonl")))
