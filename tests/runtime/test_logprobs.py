"""Log-probabilities of tokens from hidden states, and their gradient."""

import math

import pytest
import torch

from fssa_runtime.training.logprobs import token_logprob

# Three tokens. After "a" the model gives (½, ¼, ¼), after "b" (⅛, ⅛, ¾), after "c" thirds.
TABLE = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [1 / 3, 1 / 3, 1 / 3]])


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_values_by_hand(chunk_size):
    # Unnormalised on purpose: the softmax must be taken here.
    got = token_logprob(
        TABLE.log() + 5.0, torch.tensor([0, 2, 1]), lambda rows: rows, chunk_size=chunk_size
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor([0.5, 0.75, 1 / 3]).log())


@pytest.mark.parametrize("wanted", [False, True], ids=["no gradient", "gradient"])
def test_bfloat16_logits_are_reduced_in_float32(wanted):
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = torch.arange(50)
    expected = torch.log_softmax(logits.double(), -1)[torch.arange(50), tokens]
    got = token_logprob(logits.requires_grad_(wanted), tokens, lambda rows: rows * 1, chunk_size=7)
    torch.testing.assert_close(got.detach().double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [2, 64])
def test_gradients_are_those_of_all_logits_at_once(chunk_size):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 4, generator=generator)
    weight = torch.randn(11, 4, generator=generator)
    tokens = torch.randint(0, 11, (9,), generator=generator)
    scale = torch.randn(9, generator=generator)

    def head(rows):  # capped, as Gemma's is
        return 5 * torch.tanh(rows @ weight.T / 5)

    ours, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    got = token_logprob(ours, tokens, head, chunk_size=chunk_size)
    expected = torch.log_softmax(head(plain), -1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(got, expected)
    (got * scale).sum().backward()
    (expected * scale).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-5, atol=1e-6)


def test_logits_are_made_once_and_never_for_more_than_a_chunk():
    rows_seen = []

    def project(rows):
        rows_seen.append(len(rows))
        return rows * 2

    hidden = torch.zeros(20, 8, requires_grad=True)
    tokens = torch.zeros(20, dtype=torch.long)
    values = token_logprob(hidden, tokens, project, chunk_size=8)
    kept = values.grad_fn.saved_tensors
    assert sum(t.numel() for t in kept) == hidden.numel()
    values.sum().backward()
    assert rows_seen == [8, 8, 4]


def test_no_token_at_all():
    hidden = torch.zeros(0, 8, requires_grad=True)
    values = token_logprob(hidden, torch.zeros(0, dtype=torch.long), lambda rows: rows)
    assert values.shape == (0,)
    values.sum().backward()
    assert hidden.grad.shape == (0, 8)


def test_a_head_that_is_trained_is_refused():
    weight = torch.ones(8, 3, requires_grad=True)
    hidden = torch.zeros(2, 8, requires_grad=True)
    tokens = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="project: expected no weights that are trained"):
        token_logprob(hidden, tokens, lambda rows: rows @ weight)
    assert token_logprob(hidden.detach(), tokens, lambda rows: rows @ weight).tolist() == (
        pytest.approx([math.log(1 / 3)] * 2)
    )


def test_bad_arguments_are_named():
    hidden = torch.zeros(3, 8)
    with pytest.raises(ValueError, match="tokens: expected one for each row"):
        token_logprob(hidden, torch.zeros(2, dtype=torch.long), lambda rows: rows)
    with pytest.raises(ValueError, match="chunk_size"):
        token_logprob(hidden, torch.zeros(3, dtype=torch.long), lambda rows: rows, chunk_size=0)
