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
from ..models.messages import Content, chat_messages
from .choices import Choice, ChoiceLike, arranged, checked_choices, options_of
from .embedding import Steps, result_of
from .encoder import Latent, antithetic_noise

# Latents drawn from the posterior. The same for every question and user, so that two questions are
# compared on the same possible users.
NUM_SAMPLES = 256
NOISE_SEED = 0
# Candidates whose rewards are taken together: bounds the memory of S latents for each, and the time
# of a step.
MAX_AT_ONCE = 64
# Relative. Rewards are float32, and the last bits of equal candidates' depend on their places.
EQUAL = 1e-5

# A prompt and two answers to it, of which neither is preferred yet.
Candidate = tuple[Content, Content, Content]
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


def suggest_next_pair(
    model: QuestionModel,
    embed: Embed,
    choices: Sequence[ChoiceLike],
    candidates: Sequence[Candidate],
    *,
    num_samples: int = NUM_SAMPLES,
) -> Suggestion:
    """The pair of texts to show a user next who has made `choices` so far, n = 0 included.

    model: a reward trained on texts with a stochastic encoder; embed: as it was trained with,
    m (prompt, completion) → [m, E]. candidates: (prompt, one answer, another answer). Of equal
    candidates the first is taken.

    Raises:
        InputError: choices as `checked_choices` refuses them; no candidates, one that is not a
            prompt with two different answers, embeddings that are not finite, a deterministic
            encoder.
    """
    checked = checked_choices(choices)
    embedded = embed(options_to_read(checked, candidates))
    return result_of(suggestion_of(model, embedded, checked, num_samples=num_samples))


def options_to_read(
    choices: Sequence[Choice], candidates: Sequence[Candidate]
) -> list[tuple[Content, Content]]:
    """The options that a suggestion is made from, in the order in which `suggestion_of` takes their
    embeddings: those of the choices as in `options_of`, then both sides of the m candidates.

    Raises:
        InputError: no candidates, or one that is not a prompt with two different answers.
    """
    if isinstance(candidates, str) or not isinstance(candidates, Sequence):
        raise InputError(
            "candidates: expected a list of (prompt, one answer, another answer), "
            f"got {type(candidates).__name__}"
        )
    if not candidates:
        raise InputError("candidates: expected at least one pair, got none")
    for number, candidate in enumerate(candidates):
        _check_candidate(number, candidate)
    return [
        *options_of(choices),
        *((prompt, one) for prompt, one, _ in candidates),
        *((prompt, other) for prompt, _, other in candidates),
    ]


@torch.no_grad()
def suggestion_of(
    model: QuestionModel,
    embedded: Tensor,
    choices: Sequence[Choice],
    *,
    num_samples: int = NUM_SAMPLES,
) -> Steps[Suggestion]:
    """The suggestion from the embeddings of `options_to_read`, `MAX_AT_ONCE` candidates at a time.

    Raises:
        InputError: embeddings that are not finite, a deterministic encoder.
    """
    embedded = embedded.float()
    if not torch.isfinite(embedded).all():
        raise InputError("embed: expected finite embeddings, got NaN or infinity")
    num_read = len(options_of(choices))
    num_candidates = (len(embedded) - num_read) // 2
    known, one, other = embedded.split([num_read, num_candidates, num_candidates])
    latent = model.encode(*(part[None] for part in arranged(choices, known)))
    if latent is None:
        raise InputError("questions: expected a model with an encoder, got one without")
    parts = []
    for pairs in zip(one.split(MAX_AT_ONCE), other.split(MAX_AT_ONCE), strict=True):
        a, b = (side[None] for side in pairs)
        parts.append(information_of_questions(model, latent, a, b, num_samples=num_samples)[0])
        yield 0
    information = torch.cat(parts)
    most = information.max()
    best = (information >= most - EQUAL * most.abs()).nonzero()[0]
    return Suggestion(int(best), information)


def _check_candidate(number: int, candidate: object) -> None:
    # Three letters are a sequence of three, too.
    if isinstance(candidate, str) or not isinstance(candidate, Sequence) or len(candidate) != 3:
        raise InputError(
            f"candidates: pair {number}: expected (prompt, one answer, another answer), "
            f"got {candidate!r}"
        )
    fields = (("prompt", "user"), ("one answer", "assistant"), ("another answer", "assistant"))
    _, one, other = (
        chat_messages(f"candidates: pair {number}: {name}", text, role)
        for (name, role), text in zip(fields, candidate, strict=True)
    )
    if one == other:
        raise InputError(f"candidates: pair {number}: both answers are the same")


def _entropy(log_probs: Tensor) -> Tensor:
    """-Σ p log p over the last dimension, with 0 log 0 = 0."""
    return torch.special.entr(log_probs.exp()).sum(dim=-1)
