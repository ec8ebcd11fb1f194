"""What to ask a user next, in texts: their choices and candidates in, the pair that tells most out.

How much an answer tells needs p(answer | z) for many z of the user's posterior. Of a reward that is
one small network over embeddings; of a policy two passes of the language model for every z, answer
and candidate, and a policy's z is no distribution unless its encoder is stochastic. So a reward is
asked (NP-BTL), with its own encoder over the same choices: it has to know the base model, not the
conditioning.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..conditioning.choices import Choice
from ..conditioning.embedding import MAX_BATCH_TOKENS, Steps, embedding_steps
from ..conditioning.questions import Candidate, Suggestion, options_to_read, suggestion_of
from ..errors import InputError
from ..models.language_model import LanguageModel
from ..models.messages import Content
from ..training.reward_model import TextReward, load_text_reward

HOW_TO_TRAIN = (
    "train one with `fssa train reward` and encoder.stochastic: true, objective: marginal in the "
    "recipe"
)


def suggestion_steps(
    model: LanguageModel,
    reward: TextReward | str | Path,
    choices: Sequence[Choice],
    candidates: Sequence[Candidate],
    max_tokens: int = MAX_BATCH_TOKENS,
) -> Steps[Suggestion]:
    """The pair to show next to who has made these choices, ``max_tokens`` tokens of the options at
    a time. What is equal among choices and candidates is read once.

    reward: a `TextReward`, or the folder of one.

    Raises:
        InputError: a reward of another base model, without a stochastic encoder or not trained on
            texts; no candidates, one that is not a prompt with two different answers, an option
            longer than the model's context.
    """
    if not isinstance(reward, TextReward):
        reward = load_text_reward(reward)
    _check_fit(model, reward)
    options = options_to_read(choices, candidates)
    places: dict[str, int] = {}
    distinct: list[tuple[Content, Content]] = []
    for option in options:
        if places.setdefault(repr(option), len(distinct)) == len(distinct):
            distinct.append(option)
    embedded = yield from embedding_steps(model, reward.reading.embedding, distinct, max_tokens)
    rows = [places[repr(option)] for option in options]
    return (yield from suggestion_of(reward.model, embedded[rows], choices))


def _check_fit(model: LanguageModel, reward: TextReward) -> None:
    encoder, reading = reward.model.config.encoder, reward.reading
    if encoder is None or not encoder.stochastic:
        found = "a deterministic one" if encoder else "none"
        raise InputError(
            f"{reward.name}: expected a stochastic encoder, got {found}, which has no uncertainty "
            f"to reduce; {HOW_TO_TRAIN}"
        )
    if reading.base_fingerprint != model.fingerprint:
        raise InputError(
            f"{reward.name} was trained on texts as {reading.base_model!r} reads them (weights "
            f"{reading.base_fingerprint[:12]}…), not the model given (weights "
            f"{model.fingerprint[:12]}…); {HOW_TO_TRAIN}"
        )
    width = reading.embedding.width(model.decoder.config.hidden_size)
    if reward.model.config.option_dim != width:
        raise InputError(
            f"{reward.name}: expected options of size {width} (pooling "
            f"{reading.embedding.pooling!r}), got {reward.model.config.option_dim}"
        )
