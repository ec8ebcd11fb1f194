"""The reward network: formulas, padding, and checkpoints that restore everything."""

import json
import math

import pytest
import torch
from torch import nn

from fssa_runtime.conditioning.encoder import (
    MAX_LOG_STD,
    MIN_LOG_STD,
    EncoderSettings,
    antithetic_noise,
)
from fssa_runtime.training.losses import choice_loss, kl_diagonal_gaussians
from fssa_runtime.training.reward_model import (
    RewardModel,
    RewardModelConfig,
    load_reward,
    save_reward,
)
from fssa_runtime.training.reward_objective import RewardObjective
from fssa_runtime.training.synthetic import Population, SyntheticTasks
from fssa_runtime.training.tasks import TaskConfig, collate_options

MODELS = {
    "np-btl": RewardModelConfig(
        option_dim=2, hidden_dim=16, encoder=EncoderSettings(latent_dim=4, hidden_dim=16)
    ),
    "btl": RewardModelConfig(option_dim=2, hidden_dim=16, encoder=None),
    "dpl": RewardModelConfig(option_dim=2, hidden_dim=16, encoder=None, gaussian=True),
    "linear": RewardModelConfig(
        option_dim=2,
        hidden_dim=16,
        encoder=EncoderSettings(latent_dim=4, hidden_dim=16),
        head="linear",
    ),
    "logit": RewardModelConfig(option_dim=2, hidden_dim=16, encoder=None, head="linear"),
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


def make_batch(population=None, count=6, num_options=2):
    tasks = SyntheticTasks(
        population or Population("normal"),
        TaskConfig(),
        num_tasks=count,
        seed=0,
        num_options=num_options,
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
        assert torch.equal(restored(batch).log_probs, model(batch).log_probs)
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
        log_probs, latents = model(batch)
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
    margin = chosen - rejected
    expected = torch.stack([margin.sigmoid().log(), (-margin).sigmoid().log()])
    torch.testing.assert_close(log_probs[2, 3], expected)

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
        RewardObjective(copy)(**padded)["loss"].backward()
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
    log_probs = model.target_log_probs(batch, target.rsample())
    nll = choice_loss(log_probs[..., 0], batch["target_mask"])
    expected = nll + 0.7 * kl.sum() / (5 * 20 + 10)
    torch.testing.assert_close(outputs["loss"], expected)
    torch.testing.assert_close(outputs["kl"], kl.mean())


def test_marginal_loss_is_of_all_choices_of_a_user_together():
    """By hand from the samples: -log mean_s Π_j p_sj of every user, per choice."""
    model, batch = make_model(stochastic=True), make_batch()
    batch["target_mask"][0, 10:] = False
    torch.manual_seed(5)
    outputs = RewardObjective(model, objective="marginal", num_samples=6)(**batch)
    torch.manual_seed(5)
    noise = antithetic_noise((6, 4), 6)
    context = model.encode(*(batch[f"context_{k}"] for k in ("chosen", "rejected", "mask")))
    total = 0.0
    for user in range(6):
        real = batch["target_mask"][user]
        joint = []
        for s in range(6):
            z = context.mean[user] + context.log_std[user].exp() * noise[user, s]
            one = {k: v[user][None] for k, v in batch.items()}
            log_probs = model.target_log_probs(one, z[None])[0, :, 0]
            joint.append(log_probs[real].sum())
        total -= torch.stack(joint).logsumexp(0) - math.log(6)
    torch.testing.assert_close(outputs["loss"], total / (5 * 20 + 10))


def test_predictions_average_probabilities_over_shared_noise():
    model, batch = make_model(stochastic=True), make_batch()
    noise = antithetic_noise((4,), 8, torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = model(batch, noise).log_probs
        context = model.encode(*(batch[f"context_{k}"] for k in ("chosen", "rejected", "mask")))
        each = [
            model.target_log_probs(batch, context.mean + context.log_std.exp() * e).exp()
            for e in noise
        ]
        torch.testing.assert_close(together.exp(), torch.stack(each).mean(0))
        alone = model({k: v[3:4] for k, v in batch.items()}, noise).log_probs
    torch.testing.assert_close(alone[0], together[3])


def test_antithetic_noise_cancels():
    noise = antithetic_noise((3, 5), 6, torch.Generator().manual_seed(0))
    assert noise.shape == (3, 6, 5)
    assert torch.equal(noise[:, 3:], -noise[:, :3])
    assert len(noise.unique()) == 3 * 6 * 5
    with pytest.raises(ValueError, match="num_samples: expected an even number, got 5"):
        antithetic_noise((5,), 5)


def test_noise_needs_a_stochastic_encoder():
    batch, noise = make_batch(), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="expected a stochastic encoder"):
        make_model()(batch, noise)
    with pytest.raises(ValueError, match="noise: expected none for a model without"):
        make_model("btl")(batch, noise)


def test_linear_head_weighs_the_features_of_the_options():
    model, batch = make_model("linear"), make_batch()
    options = torch.randn(6, 7, 2)
    with torch.no_grad():
        z = torch.randn(6, 3, 4)
        tastes = model.head_latent(z)
        got = model.rewards(options, z)
        expected = torch.stack(
            [model.scaler(options[u]) @ tastes[u].T for u in range(6)]
        ).transpose(1, 2)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(model.rewards(options, z[:, 1]), expected[:, 1])
        # Without an encoder: one logit for everybody.
        logit = make_model("logit")
        chosen = logit.scaler(batch["target_chosen"]) @ logit.taste
        rejected = logit.scaler(batch["target_rejected"]) @ logit.taste
        torch.testing.assert_close(
            logit(batch).log_probs[..., 0], (chosen - rejected).sigmoid().log()
        )


def test_gaussian_rewards_are_compared_by_mean_and_variance():
    model, batch = make_model("dpl"), make_batch()
    with torch.no_grad():
        sides = []
        for name in ("target_chosen", "target_rejected"):
            hidden = model.option_encoder(model.scaler(batch[name])).relu()
            out = model.head_out(model.head_option(hidden).relu())
            log_std = MIN_LOG_STD + (MAX_LOG_STD - MIN_LOG_STD) * out[..., 1].sigmoid()
            sides.append((out[..., 0], log_std.exp()))
        (mean_a, std_a), (mean_b, std_b) = sides
        p = torch.distributions.Normal(0, 1).cdf(
            (mean_a - mean_b) / (std_a.square() + std_b.square()).sqrt()
        )
        torch.testing.assert_close(model(batch).log_probs[..., 0].exp(), p)
    several = make_batch(num_options=3)
    with pytest.raises(ValueError, match="expected pairs for a Gaussian reward"):
        model(several)


@pytest.mark.parametrize("kind", ["np-btl", "linear", "logit"])
def test_pairs_are_choices_among_two(kind):
    """The same pairs, written as choices with one rejected option, or with padding beside it."""
    model, pairs = make_model(kind), make_batch()
    pairs["context_mask"][0, 1:] = False
    with torch.no_grad():
        expected = model(pairs)
        for width in (1, 3):
            wider = dict(pairs)
            for name in ("context", "target"):
                filler = torch.full((1, 1, width, 1), float("nan"))
                filler[:, :, 0] = 1
                wider[f"{name}_rejected"] = pairs[f"{name}_rejected"][:, :, None] * filler
                real = torch.arange(width) == 0
                wider[f"{name}_mask"] = pairs[f"{name}_mask"][..., None] & real
            got = model(wider)
            torch.testing.assert_close(got.log_probs[..., :2], expected.log_probs)
            assert (got.log_probs[..., 2:] == -torch.inf).all()
            if expected.latents is not None:
                torch.testing.assert_close(got.latents, expected.latents)


def test_gradients_of_choices_among_several_ignore_padding():
    gradients = []
    for padding in (0.0, float("nan")):
        batch = make_batch(num_options=4)
        for name in ("context", "target"):
            batch[f"{name}_mask"][:, ::2, 2:] = False
            batch[f"{name}_mask"][:, 5:] = False
            batch[f"{name}_rejected"][~batch[f"{name}_mask"]] = padding
            gone = ~batch[f"{name}_mask"].any(-1)
            batch[f"{name}_chosen"][gone] = padding
        model = make_model()
        loss = RewardObjective(model)(**batch)["loss"]
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for clean, poisoned in zip(*gradients, strict=True):
        torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)
        assert torch.isfinite(clean).all()
