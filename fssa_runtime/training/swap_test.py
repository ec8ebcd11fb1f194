"""The swap test: do generated texts follow the choices, in both directions and in between?

For a taste k, users who want more of it (A) and users who want less (B) make a few noisy choices.
The same held-out prompts are answered under both: A's texts must measure higher than B's. A latent
halfway between must lie between. And a taste must be reached by good text: beside every score
stand the negative log-likelihood a token under the unmodulated model, repetition and loops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from ..conditioning.choices import Choice
from ..conditioning.user_weights import UserWeights
from ..llm import LLM
from ..models.language_model import LanguageModel
from ..models.packed import PackedOptions, batches_by_tokens
from ..request import Completion, SamplingParams
from .answers import read_answers, read_prompts
from .policy_options import MAX_BATCH_TOKENS, answer_logprobs
from .population import PopulationConfig, candidates, heldout_answers, simulate
from .progress import counted
from .reward import PreferenceFiles
from .tastes import TASTES, TasteScale, has_loop, repetition

# A mean this many standard errors above zero is above it with 95 % confidence, two-sided.
_NORMAL_95 = 1.96


class SwapTestConfig(BaseModel):
    """What to measure, read from YAML.

    ``users_per_side`` users want more and as many want less of each taste; each makes
    ``num_choices`` choices among ``answers`` to prompts that the training on ``data`` held out.
    Those to answer are ``num_prompts`` lines of the file ``prompts`` from line ``first_prompt`` (0
    is the first) on, none of which may occur among the answers. ``mixtures`` are shares of the way
    from less to more.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    conditioning: Path
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    data: PreferenceFiles
    answers: Path
    prompts: Path
    population: PopulationConfig
    first_prompt: int = Field(ge=0)
    num_prompts: int = Field(ge=2)
    users_per_side: int = Field(ge=1)
    num_choices: int = Field(ge=0)
    mixtures: tuple[float, ...] = (0.5,)
    max_tokens: int = Field(96, ge=1)
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(0.9, gt=0, le=1)
    batch_size: int = Field(32, ge=1)
    seed: int = 0


@dataclass(frozen=True)
class _Condition:
    """One column of the result: ``users[j]`` answers prompt j."""

    taste: str
    name: str
    weight: float
    users: Sequence[UserWeights | None]


def run_swap_test(config: SwapTestConfig, device: str = "cpu") -> dict[str, Any]:
    """Generate, measure and summarise; a plain dict for JSON.

    Raises:
        InputError, ValueError: files that do not fit together.
    """
    prompts = read_prompts(config.prompts)
    prompts = prompts[config.first_prompt : config.first_prompt + config.num_prompts]
    if len(prompts) < config.num_prompts:
        raise ValueError(f"num_prompts: expected at most {len(prompts)} from there on")
    answers = candidates(read_answers(config.answers), config.population.min_words)
    overlap = sorted(set(prompts) & set(answers))
    if overlap:
        raise ValueError(f"prompts: {overlap[0]!r} and {len(overlap) - 1} more were trained on")
    texts = [text for options in answers.values() for text in options]
    scale = TasteScale.fit(texts, config.population.tastes)
    context = heldout_answers(config.data, answers)
    model = LanguageModel.load(config.model, dtype=config.dtype, device=device, show_progress=True)
    llm = LLM(model, config.conditioning, max_batch_size=config.batch_size)
    conditions = [_Condition("", "unmodulated", 0.0, [None] * len(prompts))]
    for number, taste in enumerate(config.population.tastes):
        conditions += _sides(config, llm, taste, number, context, scale, len(prompts))
    completions = _generate(config, llm, prompts, conditions)
    result: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "num_prompts": len(prompts),
        "conditions": {},
        "swap": {},
    }
    scores: dict[tuple[str, str], np.ndarray] = {}
    for condition, answered in zip(conditions, completions, strict=True):
        summary, measured = _measure(model, prompts, answered, config.population.tastes)
        result["conditions"][f"{condition.taste} {condition.name}".strip()] = summary
        if condition.taste:
            scores[condition.taste, condition.name] = measured[condition.taste]
        else:
            for taste in config.population.tastes:
                scores[taste, condition.name] = measured[taste]
    base = result["conditions"]["unmodulated"]["nll_per_token"]
    for name, summary in result["conditions"].items():
        if name != "unmodulated":
            summary["nll_above_own_samples"] = summary["nll_per_token"] - base
    for taste in config.population.tastes:
        result["swap"][taste] = _swap(config, taste, scores)
    return result


def _sides(
    config: SwapTestConfig,
    llm: LLM,
    taste: str,
    number: int,
    context: dict[str, list[str]],
    scale: TasteScale,
    num_prompts: int,
) -> list[_Condition]:
    """Users for and against one taste, and latents between them."""
    conditioning = llm.conditioning
    assert conditioning is not None
    latents = {}
    for side, sign in (("more", 1.0), ("less", -1.0)):
        users = {
            f"{side}{i}": {taste: sign * config.population.strength}
            for i in range(config.users_per_side)
        }
        choices = simulate(
            context,
            users,
            scale,
            choices_per_user=config.num_choices,
            seed=config.seed + 1000 * (2 * number + (sign > 0)),
            min_difference=config.population.min_difference,
        )
        latents[side] = [
            conditioning.infer(
                llm.model,
                [Choice(c.prompt, c.chosen, c.rejected) for c in choices if c.user == user],
            )
            for user in users
        ]
    mixes = {"less": 0.0, **{f"mix {m:g}": m for m in sorted(config.mixtures)}, "more": 1.0}
    conditions = []
    for name, mix in mixes.items():
        mixed = [
            conditioning.blend([(1.0, torch.lerp(less, more, mix))])
            for less, more in zip(latents["less"], latents["more"], strict=True)
        ]
        turns = [mixed[j % len(mixed)] for j in range(num_prompts)]
        conditions.append(_Condition(taste, name, 2 * mix - 1, turns))
    return conditions


def _generate(
    config: SwapTestConfig,
    llm: LLM,
    prompts: Sequence[str],
    conditions: Sequence[_Condition],
) -> list[list[Completion]]:
    requested = [
        llm.request(
            prompt,
            user,
            SamplingParams(
                max_tokens=config.max_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=config.seed + j,
            ),
        )
        for condition in conditions
        for j, (prompt, user) in enumerate(zip(prompts, condition.users, strict=True))
    ]
    with counted("answering under every condition", len(requested)) as count:
        flat = llm.run(requested, on_finish=lambda _i, _c: count(1))
    return [flat[i : i + len(prompts)] for i in range(0, len(flat), len(prompts))]


def _measure(
    model: LanguageModel,
    prompts: Sequence[str],
    completions: Sequence[Completion],
    tastes: Sequence[str],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    texts = [model.decode(completion.tokens).strip() for completion in completions]
    measured = {t: np.array([TASTES[t].measure(text) for text in texts]) for t in tastes}
    nll = unmodulated_nll(model, prompts, [completion.tokens for completion in completions])
    counts = np.array([len(completion.tokens) for completion in completions])
    return {
        "tastes": {t: _mean_and_error(values) for t, values in measured.items()},
        "words": _mean_and_error(np.array([len(text.split()) for text in texts], dtype=float)),
        "nll_per_token": float(nll.sum() / counts.sum()),
        "repeated_4_grams": float(np.mean([repetition(text) for text in texts])),
        "loops": float(np.mean([has_loop(text) for text in texts])),
        "finished": float(np.mean([c.finish_reason == "stop" for c in completions])),
        "texts": texts,
    }, measured


@torch.no_grad()
def unmodulated_nll(
    model: LanguageModel, prompts: Sequence[str], answers: Sequence[Sequence[int]]
) -> np.ndarray:
    """−log p of each answer under the unmodulated model, nats, summed over its tokens ``[m]``."""
    options = [(model.chat_tokens(p), list(a)) for p, a in zip(prompts, answers, strict=True)]
    out = np.zeros(len(options))
    lengths = [len(prompt) + len(answer) for prompt, answer in options]
    for batch in batches_by_tokens(lengths, MAX_BATCH_TOKENS):
        packed = PackedOptions.pack([options[i] for i in batch], model.decoder.device)
        out[batch] = -answer_logprobs(model.decoder, packed).cpu().numpy()
    return out


def _swap(
    config: SwapTestConfig, taste: str, scores: dict[tuple[str, str], np.ndarray]
) -> dict[str, Any]:
    between = [f"mix {m:g}" for m in sorted(config.mixtures)]
    means = [float(scores[taste, name].mean()) for name in ("less", *between, "more")]
    difference = scores[taste, "more"] - scores[taste, "less"]
    measured = _mean_and_error(difference)
    return {
        "more_minus_less": measured,
        "passes": bool(measured["mean"] > _NORMAL_95 * measured["standard_error"]),
        "share_of_prompts_right": float((difference > 0).mean()),
        "share_of_prompts_wrong": float((difference < 0).mean()),
        "means_from_less_to_more": means,
        "monotone": all(a <= b for a, b in pairwise(means)),
        "spearman": spearman(means),
        "unmodulated": float(scores[taste, "unmodulated"].mean()),
    }


def spearman(values: Sequence[float]) -> float:
    """Rank correlation of values with their order: 1 if they only rise. Equal ones share a rank."""
    array = np.asarray(values)
    ranks = (array[:, None] > array).sum(1) + 0.5 * ((array[:, None] == array).sum(1) - 1)
    order = np.arange(len(array)) - np.arange(len(array)).mean()
    ranks = ranks - ranks.mean()
    spread = (order @ order) * (ranks @ ranks)
    return float(order @ ranks / math.sqrt(spread)) if spread else 0.0


def _mean_and_error(values: np.ndarray) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "standard_error": float(values.std(ddof=1) / math.sqrt(len(values))),
    }
