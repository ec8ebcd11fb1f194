"""Who is known: names, choices, latents, and the weights they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..conditioning.beliefs import Belief, learning_steps, prior_belief
from ..conditioning.checkpoint import Conditioning
from ..conditioning.choices import Choice, ChoiceLike, checked_choices
from ..conditioning.embedding import MAX_BATCH_TOKENS, Steps, result_of
from ..conditioning.questions import Candidate, Suggestion
from ..conditioning.user_weights import UserWeights
from ..errors import InputError
from ..models.language_model import LanguageModel
from ..training.reward_model import TextReward, load_text_reward
from .questions import HOW_TO_TRAIN, suggestion_steps

# A name, shares of several names, weights themselves, or None for the base model's.
WhoseWeights = str | Mapping[str, float] | UserWeights | None

# What is asked which question tells most: a reward, or the folder of one.
AnyReward = TextReward | str | Path


@dataclass(frozen=True)
class User:
    """Somebody known. A change makes another `User`; requests keep the weights they came with.

    Attributes:
        belief: what their choices say, and how surely; None if the latent was given.
    """

    name: str
    choices: tuple[Choice, ...]
    latent: torch.Tensor
    weights: UserWeights
    belief: Belief | None


class Users:
    """Users of one conditioned model, by name.

    Args:
        reward: what `suggest_next_pair` asks if it is not given another; read when first needed.
        forget: called with the weights of a user who is deleted or gets others.
    """

    def __init__(
        self,
        model: LanguageModel,
        conditioning: Conditioning | None,
        *,
        reward: AnyReward | None = None,
        forget: Callable[[UserWeights], None] = lambda _weights: None,
    ) -> None:
        self._model = model
        self._conditioning = conditioning
        self._reward = reward
        self._forget = forget
        self._users: dict[str, User] = {}

    def __len__(self) -> int:
        return len(self._users)

    def __iter__(self) -> Iterator[str]:
        return iter(self._users)

    def __contains__(self, name: object) -> bool:
        return name in self._users

    def __getitem__(self, name: str) -> User:
        """The user of that name; InputError if there is none."""
        user = self._users.get(name)
        if user is None:
            raise InputError(f"user {name!r} is not known")
        return user

    def infer(self, name: str, choices: Sequence[ChoiceLike]) -> User:
        """Know a user by a few choices (prompt, chosen, rejected), instead of what was known.

        A choice may be a mapping with these three as well. ``rejected`` is one answer, or a
        list of those that the chosen one was preferred to.

        Raises:
            InputError: no name, or choices as `checked_choices` refuses them.
        """
        return result_of(self.infer_steps(name, choices))

    def add_choices(self, name: str, choices: Sequence[ChoiceLike]) -> User:
        """Know a user better: what they chose before and these. Only these are read.

        Equal to `infer` of all of them but for rounding. With a latent that was set there is
        nothing to add to: then these are all that is known.
        """
        return result_of(self.add_steps(name, choices))

    def infer_steps(
        self,
        name: str,
        choices: Sequence[ChoiceLike],
        max_tokens: int = MAX_BATCH_TOKENS,
    ) -> Steps[User]:
        """As `infer`, ``max_tokens`` tokens of the options at a time."""
        _check_name(name)
        nobody = prior_belief(self._need().encoder)
        return (yield from self._learn(name, (), nobody, choices, max_tokens))

    def add_steps(
        self,
        name: str,
        choices: Sequence[ChoiceLike],
        max_tokens: int = MAX_BATCH_TOKENS,
    ) -> Steps[User]:
        """As `add_choices`, ``max_tokens`` tokens of the new options at a time."""
        user = self[name]
        belief = user.belief or prior_belief(self._need().encoder)
        return (yield from self._learn(name, user.choices, belief, choices, max_tokens))

    def _learn(
        self,
        name: str,
        known: tuple[Choice, ...],
        belief: Belief,
        choices: Sequence[ChoiceLike],
        max_tokens: int,
    ) -> Steps[User]:
        conditioning = self._need()
        checked = checked_choices(choices)
        belief = yield from learning_steps(conditioning, self._model, belief, checked, max_tokens)
        return self._keep(name, (*known, *checked), belief.mean, belief)

    def suggest_next_pair(
        self, name: str, candidates: Sequence[Candidate], reward: AnyReward | None = None
    ) -> Suggestion:
        """Which of these pairs to let a user choose from next: the one whose answer is expected to
        tell most about them, given what they chose before (docs/METHOD.md section 7).

            I(answer; z | choices) = H(E_z p(answer | z)) - E_z H(p(answer | z))

        Args:
            candidates: pairs that might be shown, each (prompt, one answer, another answer).
            reward: of this base model, with a stochastic encoder: the folder that
                `fssa train reward` wrote, or, to read it once for many calls, what
                `load_text_reward` made of it. None: the one that belongs to the conditioning.

        Returns:
            ``best``, the place of the pair in the list, the first of equal ones, and
            ``information``, nats [m] in float64, of every pair: between 0 and ln 2 up to rounding.
            Deterministic; changes nobody. Of a latent that was set nothing is known here: then it
            is as with no choices at all.

        Raises:
            InputError: an unknown user, no candidates, one that is not a prompt with two different
                answers, or a reward that does not fit: the message says what to train.

        Source: Houlsby, Huszár, Ghahramani, Lengyel, arXiv 1112.5745.
        """
        return result_of(self.suggest_steps(name, candidates, reward))

    def suggest_steps(
        self,
        name: str,
        candidates: Sequence[Candidate],
        reward: AnyReward | None = None,
        max_tokens: int = MAX_BATCH_TOKENS,
    ) -> Steps[Suggestion]:
        """As `suggest_next_pair`, ``max_tokens`` tokens of the options at a time."""
        choices = self[name].choices
        asked = self._own_reward() if reward is None else reward
        return (yield from suggestion_steps(self._model, asked, choices, candidates, max_tokens))

    def set_latent(self, name: str, latent: torch.Tensor) -> User:
        """Know a user by a latent ``z [Z]`` and no choices; a copy of it is kept.

        Raises:
            InputError: no name, no tensor, NaN or infinity, or the wrong length.
        """
        _check_name(name)
        return self._keep(name, (), latent, None)

    def delete(self, name: str) -> None:
        """Know a user no more. Requests in flight end with the weights they came with.

        Choices and latent are gone, and so are rows of the table, earlier ones too, each once no
        request in flight has it. Only the row of a mixture they are part of, or of weights that
        somebody kept and asks with later, stays until others need its slot. What was cached of
        their texts cannot be found again but by the very same weights.

        Raises:
            InputError: there is none of that name.
        """
        user = self[name]
        del self._users[name]
        self._forget(user.weights)

    def weights(self, whose: WhoseWeights) -> UserWeights | None:
        """The weights of a name or a mixture of names; None for nobody's.

        Raises:
            InputError: an unknown name, a mixture of nobody or with a share that is not finite, or
                none of these.
        """
        if whose is None or isinstance(whose, UserWeights):
            return whose
        if isinstance(whose, str):
            return self[whose].weights
        if not isinstance(whose, Mapping):
            raise InputError(
                f"user: expected a name, a mixture of names or weights, got {type(whose).__name__}"
            )
        parts = [(share, self[name].latent) for name, share in whose.items()]
        return self._need().blend(parts)

    def _need(self) -> Conditioning:
        if self._conditioning is None:
            raise InputError(
                f"no conditioning is loaded for {self._model.name!r}, so nobody can be steered; "
                "train one with `fssa train policy`"
            )
        return self._conditioning

    def _own_reward(self) -> TextReward:
        if self._reward is None:
            raise InputError(
                f"no reward is loaded for {self._model.name!r}, so nothing says which question "
                f"tells most; {HOW_TO_TRAIN}"
            )
        if not isinstance(self._reward, TextReward):
            self._reward = load_text_reward(self._reward)
        return self._reward

    def _keep(
        self, name: str, choices: tuple[Choice, ...], latent: torch.Tensor, belief: Belief | None
    ) -> User:
        weights = self._need().blend([(1.0, latent)])
        user = User(name, choices, latent.detach().float().cpu().clone(), weights, belief)
        before = self._users.get(name)
        self._users[name] = user
        if before is not None and before.weights.fingerprint != weights.fingerprint:
            self._forget(before.weights)
        return user


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise InputError(f"a user's name: expected text, got {type(name).__name__}")
    if not name:
        raise InputError("a user needs a name, got an empty one")
