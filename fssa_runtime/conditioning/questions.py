"""Which question to ask next: the one whose answer is expected to tell most about the user.

The expected information gain of a question is the mutual information between its answer and the
latent, under what is believed of the user so far (METHOD.md section 7):

    I(answer; z | choices) = H( E_z p(answer | z) ) - E_z H( p(answer | z) ),   z ~ q(z | choices)

A question whose answer is a coin toss for everybody gains nothing, nor one that everybody answers
alike; one that the possible users answer differently, each surely, gains most. Source of the
criterion: Houlsby, Huszár, Ghahramani, Lengyel, arXiv 1112.5745.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import InputError
from ..models.language_model import Content
from .checkpoint import Choice
from .encoder import Latent, antithetic_noise

# Latents drawn from the posterior. The same for every question and user, so that two questions are
# compared on the same possible users.
NUM_SAMPLES = 256
NOISE_SEED = 0

Embed = Callable[[list[tuple[Content, Content]]], Tensor]


class QuestionModel(Protocol):
    """What predicts answers: `training.reward_model.RewardModel` with a stochastic encoder."""

    def encode(self, chosen: Tensor, rejected: Tensor, mask: Tensor) -> Latent | None: ...

    def target_log_probs(self, batch: dict[str, Tensor], z: Tensor | None) -> Tensor: ...


class Suggestion(NamedTuple):
    """The candidate to ask, by its place in the list, and the expected gain of each, nats [m]."""

    best: int
    information: Tensor


def expected_information_gain(log_probs: Tensor) -> Tensor:
    """I(answer; z) of every question, in nats, [..., m] ≥ 0 up to rounding.

    log_probs [..., S, m, K]: log p(answer | z_s) for S equally likely latents; -inf where there is
    no such answer.
    """
    log_probs = log_probs.double()
    mixture = log_probs.logsumexp(dim=-3) - math.log(log_probs.shape[-3])
    return _entropy(mixture) - _entropy(log_probs).mean(dim=-2)


@torch.no_grad()
def information_of_questions(
    model: QuestionModel,
    latent: Latent,
    first: Tensor,
    others: Tensor,
    mask: Tensor | None = None,
    *,
    num_samples: int = NUM_SAMPLES,
) -> Tensor:
    """Expected information gain [U, m] of m candidate questions for each of U users.

    A question is a choice between `first` [U, m, E] and `others`: [U, m, E] for pairs, or
    [U, m, R, E] with the mask [U, m, R] bool of real options (all, if None). Deterministic.

    Raises:
        InputError: the encoder is deterministic, and so believes that it knows everybody.
    """
    if latent.log_std is None:
        raise InputError(
            "questions: expected a model with a stochastic encoder (encoder.stochastic: true), "
            "got a deterministic one, which has no uncertainty to reduce"
        )
    generator = torch.Generator().manual_seed(NOISE_SEED)
    noise = antithetic_noise((latent.mean.shape[1],), num_samples, generator)
    real = torch.ones(others.shape[:-1], dtype=torch.bool) if mask is None else mask
    batch = {"target_chosen": first, "target_rejected": others, "target_mask": real}
    log_probs = model.target_log_probs(batch, latent.samples(noise.to(latent.mean)))
    return expected_information_gain(log_probs)


@torch.no_grad()
def suggest_next_pair(
    model: QuestionModel,
    embed: Embed,
    choices: Sequence[Choice],
    candidates: Sequence[tuple[Content, Content, Content]],
    *,
    num_samples: int = NUM_SAMPLES,
) -> Suggestion:
    """The pair of texts to show a user next who has made `choices` so far, n = 0 included.

    model: a reward trained on texts with a stochastic encoder; embed: as it was trained with,
    m (prompt, completion) → [m, E]. candidates: (prompt, one answer, another answer). Of equal
    candidates the first is taken.

    Raises:
        InputError: no candidates, a candidate between an answer and itself, embeddings that are not
            finite, a deterministic encoder.
    """
    if not candidates:
        raise InputError("candidates: expected at least one pair, got none")
    for number, (_, one, other) in enumerate(candidates):
        if one == other:
            raise InputError(f"candidates: pair {number}: both answers are the same")
    sides = (
        [(c.prompt, c.chosen) for c in choices],
        [(c.prompt, c.rejected) for c in choices],
        [(prompt, one) for prompt, one, _ in candidates],
        [(prompt, other) for prompt, _, other in candidates],
    )
    embedded = embed([option for side in sides for option in side]).float()
    if not torch.isfinite(embedded).all():
        raise InputError("embed: expected finite embeddings, got NaN or infinity")
    chosen, rejected, one, other = embedded.split([len(side) for side in sides])
    mask = torch.ones(1, len(choices), dtype=torch.bool)
    latent = model.encode(chosen[None], rejected[None], mask)
    if latent is None:
        raise InputError("questions: expected a model with an encoder, got one without")
    information = information_of_questions(
        model, latent, one[None], other[None], num_samples=num_samples
    )[0]
    return Suggestion(int(information.argmax()), information)


def _entropy(log_probs: Tensor) -> Tensor:
    """-Σ p log p over the last dimension, with 0 log 0 = 0."""
    return torch.special.entr(log_probs.exp()).sum(dim=-1)
