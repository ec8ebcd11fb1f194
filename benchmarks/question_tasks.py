"""Whom `benchmarks.questions` asks: the synthetic population, and people with tastes in text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.rewards import RECIPES, SYNTHETIC, folder_of, trained
from benchmarks.text_population import People, everybody, make_choices, pure_kinds, scale_of
from fssa_runtime.conditioning.shipped import shipped_conditioning
from fssa_runtime.llm import REWARD_DIR
from fssa_runtime.models.pull import DEFAULT_MODEL
from fssa_runtime.training.commands import option_reader
from fssa_runtime.training.data import PreferenceData, Split, read_preferences, split_preferences
from fssa_runtime.training.reward import RewardConfig, RewardModel, load_reward
from fssa_runtime.training.reward_sources import embed_preferences
from fssa_runtime.training.synthetic import Population
from fssa_runtime.training.tastes import utility
from fssa_runtime.training.trainer import load_config

TEXT, SHIPPED = "text_questions/reward.yaml", "smollm2_135m/questions.yaml"


class Pairs(NamedTuple):
    """Pairs of options [..., 2, E], the probability that each kind of people prefers the first
    [..., K], and a number that tells pairs apart [...]."""

    options: Tensor
    prefers_first: Tensor
    number: Tensor

    def of(self, users: Tensor, asked: Tensor) -> Pairs:
        """One pair of each user's [U, P]: the ``asked[u]``-th, [U]."""
        return Pairs(*(part[users, asked] for part in self))


class Task(Protocol):
    """People of K kinds, and pairs to ask them about and to predict."""

    model: RewardModel
    kinds: Sequence[str]

    def questions(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Pairs: ...

    def targets(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Pairs: ...

    @property
    def ceiling(self) -> float:
        """Accuracy on targets of who knows the kind, the mean over kinds."""
        ...


@dataclass
class SyntheticTask:
    """Two kinds of people who choose without noise between random numbers."""

    model: RewardModel
    population: Population
    kinds: Sequence[str] = ("0", "1")
    ceiling: float = 1.0

    @classmethod
    def prepare(cls, seed: int, runs: Path) -> SyntheticTask:
        """With the reward of `python -m benchmarks.rewards synthetic`, trained if it is not."""
        file, data = SYNTHETIC["NP-BTL"]
        trained(file, data, seed, runs / "rewards")
        return cls(load_reward(folder_of(file, data, seed, runs / "rewards")), Population())

    def questions(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Pairs:
        options = torch.from_numpy(self.population.sample_options(rng, (*shape, 2)))
        rewards = self.population.rewards(options)
        first, second = rewards[..., 0, :], rewards[..., 1, :]
        # Numbers drawn at random are never drawn again.
        number = torch.full(shape, -1)
        return Pairs(options, (first > second).double() + 0.5 * (first == second), number)

    targets = questions


@dataclass
class TextTask:
    """People of some kinds who choose between answers to a prompt, with noise.

    Questions and targets are pairs about prompts that no training saw, and not the same prompts.
    """

    model: RewardModel
    kinds: Sequence[str]
    asked: Sequence[Pairs]
    predicted: Sequence[Pairs]

    @classmethod
    def of_four_kinds(cls, seed: int, runs: Path) -> TextTask:
        """With the reward of ``recipes/text_questions``, trained first if it is not there."""
        folder = runs / Path(TEXT).parent
        make_choices((RECIPES / TEXT).parent, folder)
        trained(TEXT, {}, seed, folder)
        kinds = pure_kinds((RECIPES / TEXT).parent)
        return cls._made(load_reward(folder_of(TEXT, {}, seed, folder)), TEXT, kinds)

    @classmethod
    def of_shipped(cls, seed: int, runs: Path) -> TextTask:
        """With the reward that ships. The kinds are the people that its training held out."""
        make_choices((RECIPES / SHIPPED).parent, runs / Path(SHIPPED).parent)
        folder = shipped_conditioning(DEFAULT_MODEL)
        assert folder is not None
        data, split = heldout(load_config(RECIPES / SHIPPED, RewardConfig))
        new = {data.preferences[row].user for row in split.heldout}
        weights = everybody((RECIPES / SHIPPED).parent)
        people = {user: weights[str(user)] for user in sorted(map(str, new))}
        return cls._made(load_reward(folder / REWARD_DIR), SHIPPED, people)

    @classmethod
    def _made(cls, model: RewardModel, file: str, kinds: People) -> TextTask:
        pairs = pairs_by_prompt(file, kinds)
        prompts = [sorted(pairs)[i] for i in np.random.default_rng(0).permutation(len(pairs))]
        half = len(prompts) // 2
        asked, predicted = ([pairs[p] for p in part] for part in (prompts[:half], prompts[half:]))
        return cls(model, list(kinds), asked, predicted)

    def questions(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Pairs:
        return drawn(self.asked, rng, shape)

    def targets(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Pairs:
        return drawn(self.predicted, rng, shape)

    @property
    def ceiling(self) -> float:
        right = [torch.maximum(p.prefers_first, 1 - p.prefers_first) for p in self.predicted]
        return float(torch.stack([p.mean() for p in right]).mean())


def drawn(by_prompt: Sequence[Pairs], rng: np.random.Generator, shape: tuple[int, ...]) -> Pairs:
    """Pairs [*shape], of a random prompt each."""
    sizes = np.array([len(pairs.number) for pairs in by_prompt])
    starts = sizes.cumsum() - sizes
    prompts = rng.integers(len(sizes), size=shape)
    rows = torch.from_numpy(starts[prompts] + rng.integers(sizes[prompts]))
    return Pairs(*(torch.cat(parts)[rows] for parts in zip(*by_prompt, strict=True)))


def heldout(recipe: RewardConfig) -> tuple[PreferenceData, Split]:
    """The choices a recipe is about, and which of them its training does not see."""
    assert recipe.data.kind == "preferences"
    data = read_preferences(recipe.data.files, pairs_only=True)
    split = split_preferences(
        data,
        heldout_users=recipe.data.heldout_users,
        heldout_prompts=recipe.data.heldout_prompts,
        seed=recipe.data.split_seed,
    )
    return data, split


def pairs_by_prompt(file: str, kinds: People) -> dict[str, Pairs]:
    """All pairs of answers that the choices show for each prompt the recipe's training held out."""
    scale = scale_of((RECIPES / file).parent)
    recipe = load_config(RECIPES / file, RewardConfig)
    data, split = heldout(recipe)
    assert recipe.options is not None
    embed, read_by, _ = option_reader(recipe.options)
    chosen, rejected, _ = embed_preferences(
        data, embed, cache=recipe.options.file, fingerprint=read_by
    )
    vectors: dict[tuple[Any, Any], Tensor] = {}
    for preference, of_chosen, of_rejected in zip(data.preferences, chosen, rejected, strict=True):
        vectors.setdefault((preference.prompt, preference.chosen), of_chosen)
        vectors.setdefault((preference.prompt, preference.rejected), of_rejected)
    new = {data.preferences[row].prompt for row in split.heldout}
    texts: dict[str, list[str]] = {prompt: [] for prompt in new}
    for prompt, text in vectors:
        if prompt in new:
            texts[prompt].append(text)
    found = {}
    numbers = itertools.count()
    for prompt in sorted(texts):
        both = list(itertools.combinations(range(len(texts[prompt])), 2))
        if not both:
            continue
        one, other = map(list, zip(*both, strict=True))
        worth = torch.tensor(
            [[utility(w, text, scale) for w in kinds.values()] for text in texts[prompt]],
            dtype=torch.float64,
        )
        options = torch.stack([vectors[prompt, text] for text in texts[prompt]])
        found[prompt] = Pairs(
            torch.stack([options[one], options[other]], dim=1),
            torch.sigmoid(worth[one] - worth[other]),
            torch.tensor([next(numbers) for _ in both]),
        )
    return found


TASKS: Mapping[str, Callable[[int, Path], Task]] = {
    "synthetic": SyntheticTask.prepare,
    "text": TextTask.of_four_kinds,
    "shipped": TextTask.of_shipped,
}
