"""Losses and log-probabilities against values worked out by hand."""

import math

import pytest
import torch

from fssa_runtime.training.losses import (
    btl_loss,
    dpo_loss,
    implicit_reward,
    kl_diagonal_gaussians,
    sequence_logprob,
    sequence_logprob_from_hidden,
    token_logprob,
)

NAN = float("nan")


def nll(margin):
    return math.log(1 + math.exp(-margin))


def test_btl_loss_by_hand():
    chosen = torch.tensor([[2.0, 0.0, NAN]])
    rejected = torch.tensor([[0.5, 1.0, 3.0]])
    mask = torch.tensor([[True, True, False]])
    expected = (nll(1.5) + nll(-1.0)) / 2
    assert btl_loss(chosen, rejected, mask).item() == pytest.approx(expected, rel=1e-6)
    assert btl_loss(chosen[:, :2], rejected[:, :2]).item() == pytest.approx(expected, rel=1e-6)


def test_btl_loss_of_nothing_is_zero_with_finite_gradient():
    chosen = torch.full((2, 3), NAN, requires_grad=True)
    loss = btl_loss(chosen, torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(chosen.grad, torch.zeros(2, 3))


def test_btl_loss_survives_huge_margins():
    margins = torch.tensor([1e4, -1e4])
    assert btl_loss(margins, torch.zeros(2)).item() == pytest.approx(5e3)


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
        btl_loss(torch.zeros(2), torch.zeros(2), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="beta"):
        dpo_loss(*[torch.zeros(1)] * 4, beta=0.0)
