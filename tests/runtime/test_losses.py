"""Losses and log-probabilities against values worked out by hand."""

import math

import pytest
import torch

from fssa_runtime.training.losses import (
    choice_loss,
    dpo_loss,
    gaussian_reward_log_probs,
    implicit_reward,
    kl_diagonal_gaussians,
    luce_log_probs,
    marginal_choice_loss,
    predictive_choice_loss,
    sequence_logprob,
    sequence_logprob_from_hidden,
    token_logprob,
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


def test_dpo_loss_by_hand():
    policy_chosen, policy_rejected = torch.tensor([-10.0, -7.0]), torch.tensor([-12.0, -3.0])
    reference_chosen, reference_rejected = torch.tensor([-11.0, -9.0]), torch.tensor([-11.0, -8.0])
    # Implicit rewards with beta = ½: chosen ½, 1; rejected -½, 2½.
    expected = (nll(1.0) + nll(-1.5)) / 2
    loss = dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.5)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    first = dpo_loss(
        policy_chosen,
        policy_rejected,
        reference_chosen,
        reference_rejected,
        beta=0.5,
        mask=torch.tensor([True, False]),
    )
    assert first.item() == pytest.approx(nll(1.0), rel=1e-6)
    assert implicit_reward(policy_rejected, reference_rejected, beta=0.5).tolist() == [-0.5, 2.5]


def test_dpo_loss_is_ln2_at_the_reference():
    logprob = torch.tensor([-10.0, -7.0])
    loss = dpo_loss(logprob, logprob - 3, logprob, logprob - 3, beta=0.05)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


# Three tokens. After "a" the model gives (½, ¼, ¼), after "b" (⅛, ⅛, ¾), after "c" thirds.
TABLE = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [1 / 3, 1 / 3, 1 / 3]])


def hand_case(dtype=torch.float32):
    """Row 0: prompt "a b", response "c a". Row 1: prompt "b", response "c", then padding."""
    tokens = torch.tensor([[0, 1, 2, 0], [1, 2, 0, 0]])
    mask = torch.tensor([[False, False, True, True], [False, True, False, False]])
    # Unnormalised on purpose: the softmax must be taken here.
    logits = (TABLE.log() + 5.0)[tokens].to(dtype)
    logits[1, 1:] = NAN
    expected = torch.tensor([math.log(0.75 / 3), math.log(0.75)])
    return logits, tokens, mask, expected


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_only_response_tokens_count(chunk_size):
    logits, tokens, mask, expected = hand_case()
    got = sequence_logprob(logits, tokens, mask, chunk_size=chunk_size)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)


def test_first_position_never_counts():
    logits, tokens, mask, expected = hand_case()
    mask[:, 0] = True
    torch.testing.assert_close(sequence_logprob(logits, tokens, mask), expected)


def test_no_response_token_gives_zero():
    logits, tokens, mask, _ = hand_case()
    assert sequence_logprob(logits, tokens, torch.zeros_like(mask)).tolist() == [0.0, 0.0]


def test_bfloat16_logits_are_reduced_in_float32():
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = torch.arange(50)
    expected = torch.log_softmax(logits.double(), -1)[torch.arange(50), tokens]
    torch.testing.assert_close(
        token_logprob(logits, tokens, chunk_size=7).double(), expected, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("chunk_size", [2, 64])
def test_hidden_states_give_the_same_values_and_gradients(chunk_size):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 4, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 11, (3, 6), generator=generator)
    mask = torch.rand(3, 6, generator=generator) < 0.6
    results = []
    for chunked in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunked:
            out = sequence_logprob_from_hidden(
                h, tokens, mask, lambda rows, w=w: rows @ w.T, chunk_size=chunk_size
            )
        else:
            logprob = torch.log_softmax((h @ w.T).float(), -1)
            picked = logprob[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
            out = (picked * mask[:, 1:]).sum(1)
        (out * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
        results.append((out.detach(), h.grad, w.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_logits_never_exist_for_more_than_a_chunk():
    rows_seen = []

    def project(rows):
        rows_seen.append(len(rows))
        return rows

    hidden = torch.zeros(2, 50, 8, requires_grad=True)
    tokens, mask = torch.zeros(2, 50, dtype=torch.long), torch.ones(2, 50, dtype=torch.bool)
    mask[:, :40] = False
    sequence_logprob_from_hidden(hidden, tokens, mask, project, chunk_size=8).sum().backward()
    forward = rows_seen[:3]
    assert forward == [8, 8, 4], "prompt positions must not be projected at all"
    assert max(rows_seen) == 8
    assert sum(rows_seen) == 40, "once forward, once recomputed"


def test_bad_arguments_are_named():
    logits, tokens, mask, _ = hand_case()
    with pytest.raises(TypeError, match="mask: expected dtype"):
        sequence_logprob(logits, tokens, mask.int())
    with pytest.raises(ValueError, match="tokens, mask: expected"):
        sequence_logprob(logits, tokens[:, :2], mask)
    with pytest.raises(ValueError, match="tokens: expected one for each row"):
        token_logprob(logits[0], tokens[0, :2])
    with pytest.raises(ValueError, match="chunk_size"):
        sequence_logprob(logits, tokens, mask, chunk_size=0)
    with pytest.raises(ValueError, match="mask: expected"):
        luce_log_probs(torch.zeros(2), torch.zeros(2), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="reward_rejected: expected"):
        luce_log_probs(torch.zeros(2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="mask: expected"):
        choice_loss(torch.zeros(2), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask: expected"):
        marginal_choice_loss(torch.zeros(2, 4, 3), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="beta"):
        dpo_loss(*[torch.zeros(1)] * 4, beta=0.0)
