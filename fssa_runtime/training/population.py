"""A population with hidden, measurable tastes that chooses between sampled answers.

User i has weights w_i over tastes. The utility of an answer is Σ_k w_ik · f_k(answer), each f_k
standardised over the corpus; between two answers to a prompt the user picks by
p(a > b) = σ(u(a) − u(b)): Bradley-Terry-Luce, so choices are noisy.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ..conditioning.choices import Choice
from ..errors import InputError
from ..users.examples import ExampleUser
from .data import Preference, read_preferences, split_preferences
from .reward import PreferenceFiles
from .tastes import TASTES, TasteScale, has_loop, utility


class PopulationConfig(BaseModel):
    """Who chooses, and how much.

    ``strength`` is the length of a user's weight vector: the larger, the less noise. A share
    ``pure`` of the users cares for one taste only, in either direction; the others' weights point
    anywhere. ``name_modes`` writes down which users are of one kind ("length+"), so that models of
    one kind alone can be trained and every kind measured. Answers are shown in pairs that differ in
    every taste by at least ``min_difference`` standard deviations: where none has a list, a choice
    says nothing about lists.
    """

    model_config = ConfigDict(extra="forbid")

    tastes: tuple[str, ...] = Field(min_length=1)
    num_users: int = Field(ge=1)
    choices_per_user: int = Field(ge=1)
    strength: float = Field(gt=0)
    pure: float = Field(0.5, ge=0, le=1)
    min_words: int = Field(3, ge=1)
    min_difference: float = Field(0.0, ge=0)
    name_modes: bool = False
    seed: int = 0


def mode_of(weights: Mapping[str, float]) -> str:
    """The kind of a user who cares for one taste only, "length+" or "length-"; "" for others."""
    cared = [(taste, weight) for taste, weight in weights.items() if weight]
    if len(cared) != 1:
        return ""
    ((taste, weight),) = cared
    return f"{taste}{'+' if weight > 0 else '-'}"


def usable_answer(answer: str, finish_reason: str, min_words: int) -> str | None:
    """The answer as it enters the data, or None if it should not.

    An answer cut by the token limit ends at its last whole sentence or line: a policy trained on
    answers that stop in the middle of a word learns to do so. Looping and empty ones are left out.
    """
    text = answer.strip()
    if finish_reason == "length":
        ends = [match.end() for match in re.finditer(r"[.!?](?=\s)|\S(?=\n)", text)]
        text = text[: ends[-1]] if ends else ""
        # A numbered line that has only begun ("3.") is not a line.
        text = re.sub(r"\n\s*(?:\d+[.)]|[-*•])\s*$", "", text).strip()
    if len(text.split()) < min_words or has_loop(text):
        return None
    return text


def candidates(records: Sequence[Mapping[str, str]], min_words: int) -> dict[str, list[str]]:
    """Distinct usable answers of each prompt that has at least two."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        text = usable_answer(record["answer"], record["finish_reason"], min_words)
        if text is not None:
            found.setdefault(record["prompt"], {})[text] = None
    return {prompt: list(texts) for prompt, texts in found.items() if len(texts) > 1}


def user_weights(config: PopulationConfig) -> dict[str, dict[str, float]]:
    """Hidden weights of every user, by name."""
    rng = np.random.default_rng(config.seed)
    users: dict[str, dict[str, float]] = {}
    for index in range(config.num_users):
        direction = rng.normal(size=len(config.tastes))
        if rng.random() < config.pure:
            kept = rng.integers(len(config.tastes))
            direction = np.where(np.arange(len(direction)) == kept, direction, 0.0)
        direction *= config.strength / np.linalg.norm(direction)
        weights = {t: float(w) for t, w in zip(config.tastes, direction, strict=True)}
        users[f"user{index:04d}"] = weights
    return users


def pairs_that_differ(
    answers: Mapping[str, Sequence[str]], scale: TasteScale, min_difference: float
) -> dict[str, list[tuple[str, str]]]:
    """Pairs of answers to a prompt, of every prompt that has one, no taste of theirs nearer than
    ``min_difference`` standard deviations."""
    found: dict[str, list[tuple[str, str]]] = {}
    for prompt, texts in answers.items():
        measured = {text: np.array(scale.standardise(text)) for text in texts}
        pairs = [
            (a, b)
            for a, b in itertools.combinations(texts, 2)
            if (np.abs(measured[a] - measured[b]) >= min_difference).all()
        ]
        if pairs:
            found[prompt] = pairs
    return found


def simulate(
    answers: Mapping[str, Sequence[str]],
    users: Mapping[str, Mapping[str, float]],
    scale: TasteScale,
    *,
    choices_per_user: int,
    seed: int,
    min_difference: float = 0.0,
    name_modes: bool = False,
) -> list[Preference]:
    """``choices_per_user`` noisy choices of every user, each between two answers to a prompt.

    A user meets a prompt once while there are enough prompts.

    Raises:
        InputError: no prompt has two answers (that differ as much as they should).
    """
    pairs = pairs_that_differ(answers, scale, min_difference)
    if not pairs:
        raise InputError(
            "no prompt has two usable answers"
            + (f" that differ by {min_difference} in every taste" if min_difference else "")
        )
    prompts = list(pairs)
    preferences = []
    for index, (user, weights) in enumerate(users.items()):
        rng = np.random.default_rng((seed, index))
        rounds = max(1, math.ceil(choices_per_user / len(prompts)))
        order = np.concatenate([rng.permutation(len(prompts)) for _ in range(rounds)])
        for number in order[:choices_per_user]:
            prompt = prompts[number]
            if min_difference:
                a, b = pairs[prompt][rng.integers(len(pairs[prompt]))]
                if rng.random() < 0.5:
                    a, b = b, a
            else:  # answer by answer: these draws made the choices of `recipes/text_questions`
                first, second = rng.choice(len(answers[prompt]), size=2, replace=False)
                a, b = answers[prompt][first], answers[prompt][second]
            gap = utility(weights, a, scale) - utility(weights, b, scale)
            # The logistic function, written so that no gap overflows.
            prefers_a = rng.random() < (1 + math.tanh(gap / 2)) / 2
            chosen, rejected = (a, b) if prefers_a else (b, a)
            mode = mode_of(weights) if name_modes else ""
            preferences.append(Preference(user, prompt, chosen, rejected, mode))
    return preferences


def known_weights_accuracy(
    preferences: Sequence[Preference], users: Mapping[str, Mapping[str, float]], scale: TasteScale
) -> float:
    """Share of simulated choices that whoever knew the hidden weights would predict; between two
    answers of one utility they are right half the time."""

    def right(preference: Preference) -> float:
        chosen, rejected = preference.chosen, preference.rejected
        assert isinstance(chosen, str)
        assert isinstance(rejected, str)
        weights = users[preference.user]
        gap = utility(weights, chosen, scale) - utility(weights, rejected, scale)
        return (gap > 0) + 0.5 * (gap == 0)

    return statistics.fmean(map(right, preferences))


def heldout_answers(
    data: PreferenceFiles, answers: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """The answers to prompts that a training on ``data`` held out."""
    preferences = read_preferences(data.files)
    split = split_preferences(
        preferences,
        heldout_users=data.heldout_users,
        heldout_prompts=data.heldout_prompts,
        seed=data.split_seed,
    )
    heldout = {preferences.preferences[row].prompt for row in split.heldout}
    return {prompt: texts for prompt, texts in answers.items() if prompt in heldout}


class NamedUsersConfig(BaseModel):
    """People with names and weights who make ``num_choices`` choices on held-out prompts."""

    model_config = ConfigDict(extra="forbid")

    population: PopulationConfig
    data: PreferenceFiles
    users: dict[str, dict[str, float]] = Field(min_length=1)
    num_choices: int = Field(ge=0)
    seed: int = 0


def build_named_users(
    records: Sequence[Mapping[str, str]], config: NamedUsersConfig
) -> list[ExampleUser]:
    """Example users as the demo reads them."""
    answers = candidates(records, config.population.min_words)
    texts = [text for options in answers.values() for text in options]
    scale = TasteScale.fit(texts, config.population.tastes)
    choices = simulate(
        heldout_answers(config.data, answers),
        config.users,
        scale,
        choices_per_user=config.num_choices,
        seed=config.seed,
        min_difference=config.population.min_difference,
    )
    return [
        ExampleUser(
            name,
            tuple(Choice(c.prompt, c.chosen, c.rejected) for c in choices if c.user == name),
            weights,
        )
        for name, weights in config.users.items()
    ]


def write_preferences(preferences: Sequence[Preference], path: Path) -> None:
    """JSON lines as `data.read_preferences` reads them; gzip if the name ends in ``.gz``."""
    lines = "".join(json.dumps(_record(p), ensure_ascii=False) + "\n" for p in preferences).encode()
    # A fixed time stamp: the same choices give the same bytes.
    path.write_bytes(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)


def _record(preference: Preference) -> dict[str, object]:
    fields = ("user", "prompt", "chosen", "rejected")
    record = {name: getattr(preference, name) for name in fields}
    return record | ({"mode": preference.mode} if preference.mode else {})


def build_preferences(
    records: Sequence[Mapping[str, str]], config: PopulationConfig
) -> tuple[list[Preference], TasteScale]:
    """Choices of a whole population over sampled answers, and the scale of its tastes.

    Raises:
        InputError: a taste that is not measured here, or nothing to choose between.
    """
    unknown = [name for name in config.tastes if name not in TASTES]
    if unknown:
        raise InputError(f"tastes: unknown {unknown}; expected some of {', '.join(TASTES)}")
    answers = candidates(records, config.min_words)
    texts = [text for options in answers.values() for text in options]
    if not texts:
        raise InputError("no prompt has two usable answers")
    scale = TasteScale.fit(texts, config.tastes)
    preferences = simulate(
        answers,
        user_weights(config),
        scale,
        choices_per_user=config.choices_per_user,
        seed=config.seed,
        min_difference=config.min_difference,
        name_modes=config.name_modes,
    )
    return preferences, scale
