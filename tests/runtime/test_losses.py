"""Losses against values worked out by hand."""

import math

import pytest
import torch

from fssa_runtime.training.losses import (
    choice_loss,
    gaussian_reward_log_probs,
    implicit_reward,
    kl_diagonal_gaussians,
    luce_log_probs,
    marginal_choice_loss,
    predictive_choice_loss,
)

NAN = float("nan")


def nll(margin):
    return math.log(1 + math.exp(-margin))


def test_luce_by_hand():
    chosen = torch.tensor([[2.0, 0.0]])
    pairs = luce_log_probs(chosen, torch.tensor([[0.5, 1.0]]))
    expected = [[[-nll(1.5), -nll(-1.5)], [-nll(-1.0), -nll(1.0)]]]
    torch.testing.assert_close(pairs, torch.tensor(expected))

    rejected = torch.tensor([[[0.5, 1.0, NAN], [3.0, NAN, NAN]]])
    mask = torch.tensor([[[True, True, False], [True, False, False]]])
    several = luce_log_probs(chosen, rejected, mask).exp()
    weights = [[math.exp(2), math.exp(0.5), math.exp(1), 0.0], [1.0, math.exp(3), 0.0, 0.0]]
    torch.testing.assert_close(several[0], torch.tensor([[w / sum(r) for w in r] for r in weights]))


def test_luce_without_alternatives_and_with_huge_rewards():
    none = luce_log_probs(torch.zeros(1), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    assert none.tolist() == [[0.0, -math.inf, -math.inf]]
    # The difference of 1 is lost in neither direction.
    huge = luce_log_probs(torch.tensor([1e6, 1e6]), torch.tensor([1e6 - 1, 1e6 + 1]))
    assert huge[:, 0].tolist() == pytest.approx([-nll(1.0), -nll(-1.0)])
    assert luce_log_probs(torch.tensor(-1e4), torch.tensor(0.0))[0].item() == pytest.approx(-1e4)


def test_luce_gradient_ignores_what_is_not_there():
    chosen = torch.tensor([0.3], requires_grad=True)
    rejected = torch.tensor([[1.0, NAN]], requires_grad=True)
    luce_log_probs(chosen, rejected, torch.tensor([[True, False]]))[0, 0].backward()
    p = 1 / (1 + math.exp(-0.7))
    assert chosen.grad.tolist() == pytest.approx([p])
    assert rejected.grad.tolist()[0] == pytest.approx([-p, 0.0])


def test_choice_loss_by_hand():
    log_probs = torch.tensor([[-0.5, -1.5, NAN]], requires_grad=True)
    loss = choice_loss(log_probs, torch.tensor([[True, True, False]]))
    loss.backward()
    assert loss.item() == pytest.approx(1.0)
    assert log_probs.grad.tolist() == [[-0.5, -0.5, 0.0]]
    nothing = choice_loss(log_probs, torch.zeros(1, 3, dtype=torch.bool))
    assert nothing.item() == 0


def test_marginal_choice_loss_by_hand():
    p = torch.tensor([[[0.9, 0.8], [0.1, 0.5]], [[0.3, 0.5], [0.7, 0.5]]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    loss = marginal_choice_loss(p.log(), mask)
    expected = -(math.log((0.9 * 0.8 + 0.1 * 0.5) / 2) + math.log((0.3 + 0.7) / 2)) / 3
    assert loss.item() == pytest.approx(expected)
    single = marginal_choice_loss(p[:, :1].log(), mask)
    torch.testing.assert_close(single, choice_loss(p[:, 0].log(), mask))
    each = predictive_choice_loss(p.log(), mask)
    means = (math.log(0.5) + math.log(0.65) + math.log(0.5)) / -3
    assert each.item() == pytest.approx(means)
    hole = torch.where(mask[:, None].expand_as(p), p.log(), NAN)
    torch.testing.assert_close(marginal_choice_loss(hole, mask), loss)
    torch.testing.assert_close(predictive_choice_loss(hole, mask), each)


def test_gaussian_rewards_by_hand():
    one, zero = torch.tensor([1.0]), torch.tensor([0.0])
    # Scales 3 and 4: the difference has scale 5.
    got = gaussian_reward_log_probs((one, one * math.log(3)), (zero, one * math.log(4))).exp()
    p = 0.5 * (1 + math.erf(1 / 5 / math.sqrt(2)))
    assert got[0].tolist() == pytest.approx([p, 1 - p])
    far = gaussian_reward_log_probs((zero - 100, zero), (zero, zero))
    assert far[0, 0].item() == pytest.approx(
        -(50.0**2) - math.log(100 * math.sqrt(math.pi)), rel=1e-3
    )


def test_kl_by_hand_and_against_torch():
    # One unit: q = N(1, 2²), p = N(0, 1): ½(4 + 1 - 1) - ln 2.
    one = [torch.tensor([v]) for v in (1.0, math.log(2.0), 0.0, 0.0)]
    assert kl_diagonal_gaussians(*one).item() == pytest.approx(2 - math.log(2), rel=1e-6)
    mean_q, log_q, mean_p, log_p = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean_q, log_q.exp()),
        torch.distributions.Normal(mean_p, log_p.exp()),
    ).sum(-1)
    got = kl_diagonal_gaussians(mean_q, log_q, mean_p, log_p)
    torch.testing.assert_close(got, expected)
    zero = kl_diagonal_gaussians(mean_q, log_q, mean_q, log_q)
    assert torch.equal(zero, torch.zeros(5))


def test_the_dpo_loss_is_luces_rule_on_implicit_rewards():
    policy = torch.tensor([[-10.0, -12.0], [-7.0, -3.0]])
    reference = torch.tensor([[-11.0, -11.0], [-9.0, -8.0]])
    rewards = implicit_reward(policy, reference, beta=0.5)
    assert rewards.tolist() == [[0.5, -0.5], [1.0, 2.5]]
    losses = -luce_log_probs(rewards[:, 0], rewards[:, 1])[:, 0]
    assert losses.tolist() == pytest.approx([nll(1.0), nll(-1.5)], rel=1e-6)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="mask: expected"):
        luce_log_probs(torch.zeros(2), torch.zeros(2), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="reward_rejected: expected"):
        luce_log_probs(torch.zeros(2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="mask: expected"):
        choice_loss(torch.zeros(2), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask: expected"):
        marginal_choice_loss(torch.zeros(2, 4, 3), torch.ones(2, 4, dtype=torch.bool))
