"""What `benchmarks.figures` reads of a result file; anything else in the file is left alone.

Shares stay shares and names stay the file's own here; what a file lacks, or has in another form, is
named by its place in the file.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from benchmarks.policies import KINDS, is_bounded
from benchmarks.rewards import mean_and_error
from fssa_runtime.errors import InputError
from fssa_runtime.training.synthetic import Population

Key = TypeVar("Key")
Item = TypeVar("Item")
Some = Annotated[dict[Key, Item], Field(min_length=1)]
Several = Annotated[list[Item], Field(min_length=1)]


class Part(BaseModel):
    """A piece of a result file."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class Value(Part):
    """A mean and its standard error, None where there is nothing to take it over."""

    mean: float
    standard_error: float | None


def of_runs(means: Sequence[float], errors: Sequence[float | None]) -> Value:
    """Mean and standard error over runs; of a single run the error it has on its own."""
    if len(means) == 1:
        return Value(mean=means[0], standard_error=errors[0])
    return Value.model_validate(mean_and_error(means))


class _Data(Part):
    population: Literal["interval", "normal"]
    rho: float = Field(ge=-1, le=1)


class _Recipe(Part):
    data: _Data


class _Scores(Part):
    accuracy: float
    nll: float


class _Heldout(Part):
    contexts: Some[int, _Scores]


class _SyntheticRun(Part):
    recipe: _Recipe
    heldout: _Heldout


class _SyntheticMean(Part):
    accuracy: Value
    nll: Value


class _SyntheticModel(Part):
    mean: Some[int, _SyntheticMean]
    runs: Several[_SyntheticRun]

    @model_validator(mode="after")
    def same_contexts(self) -> _SyntheticModel:
        if any(run.heldout.contexts.keys() != self.mean.keys() for run in self.runs):
            raise ValueError(f"expected runs with the contexts {sorted(self.mean)} of the mean")
        return self


class Synthetic(Part):
    """Written by `python -m benchmarks.rewards synthetic`."""

    table: Literal["synthetic"]
    models: Some[str, _SyntheticModel]

    @model_validator(mode="after")
    def one_population(self) -> Synthetic:
        data = {run.recipe.data for model in self.models.values() for run in model.runs}
        seeds = {len(model.runs) for model in self.models.values()}
        if len(data) > 1 or len(seeds) > 1:
            raise ValueError("expected one population and equally many seeds for all models")
        return self

    @property
    def seeds(self) -> int:
        return len(next(iter(self.models.values())).runs)

    @property
    def population(self) -> Population:
        data = next(iter(self.models.values())).runs[0].recipe.data
        return Population(data.population, data.rho)

    def dedicated(self, name: str) -> Value | None:
        """What models with one kind of users each reach, the mean over the kinds seed by seed."""
        kinds = [m.runs for label, m in self.models.items() if label.startswith("dedicated")]
        if not kinds:
            return None
        seeds = [
            statistics.fmean(getattr(run.heldout.contexts[0], name) for run in runs)
            for runs in zip(*kinds, strict=True)
        ]
        return of_runs(seeds, [None])


class _Identified(Part):
    identification_error: Value


class _IdentifyRun(Part):
    recipe: _Recipe


class _IdentifyModel(Part):
    mean: Some[int, _Identified]
    runs: Several[_IdentifyRun]

    @model_validator(mode="after")
    def one_correlation(self) -> _IdentifyModel:
        if any(run.recipe.data != _Data(population="normal", rho=self.rho) for run in self.runs):
            raise ValueError("expected runs on normal options of one correlation")
        return self

    @property
    def rho(self) -> float:
        return self.runs[0].recipe.data.rho


class Identify(Part):
    """Written by `python -m benchmarks.rewards identify`."""

    table: Literal["identify"]
    models: Some[str, _IdentifyModel]

    @model_validator(mode="after")
    def same_contexts(self) -> Identify:
        first, *others = (model.mean.keys() for model in self.models.values())
        if any(contexts != first for contexts in others):
            raise ValueError("expected the same contexts for every correlation")
        if len({len(model.runs) for model in self.models.values()}) > 1:
            raise ValueError("expected equally many seeds for every correlation")
        return self

    @property
    def seeds(self) -> int:
        return len(next(iter(self.models.values())).runs)


class _Predicted(Part):
    nll: Value
    accuracy: Value


class People(Part):
    """Written by `python -m benchmarks.people`."""

    table: str
    num_users: int
    mean: Some[int, Some[str, _Predicted]]
    folds: Several[dict]

    @model_validator(mode="after")
    def same_predictors(self) -> People:
        first, *others = (entry.keys() for entry in self.mean.values())
        if any(names != first for names in others):
            raise ValueError("expected the same predictors at every n")
        return self


class _Ways(Part):
    active: Several[Value]
    random: Several[Value]


class _Reached(Part):
    mean: float | None


class _Needed(Part):
    active: _Reached
    random: _Reached


class _QuestionsMean(Part):
    accuracy: _Ways
    choices_needed: _Needed


class Questions(Part):
    """Written by `python -m benchmarks.questions`."""

    task: str
    ceiling: float
    share_of_ceiling: float
    pool: int
    mean: _QuestionsMean
    runs: Several[dict]


class _ModeScores(Part):
    accuracy: float
    accuracy_se: float | None = None


class _PolicyScores(_ModeScores):
    modes: Some[str, _ModeScores]


class _PolicyRun(Part):
    contexts: Some[int, _PolicyScores]


class Policies(Part):
    """`python -m benchmarks.policies`: a policy for everybody is the floor, one dedicated to a
    kind of people the ceiling there; the others stand between them."""

    runs: Several[dict[str, _PolicyRun]]

    @model_validator(mode="after")
    def comparable(self) -> Policies:
        if not self.bounded:
            raise ValueError("runs: expected one with the floor and every ceiling")
        for seed, run in enumerate(self.runs):
            for name, policy in run.items():
                if name.startswith("DPO, ") and policy.contexts.keys() != {0}:
                    raise ValueError(f"runs.{seed}.{name}: expected scores without choices")
        for name in self.between:
            contexts = {frozenset(run[name].contexts) for run in self._trained(name)}
            if len(contexts) > 1:
                raise ValueError(f"runs.*.{name}: expected the same contexts in every run")
            for run in self._trained(name):
                for n, scores in run[name].contexts.items():
                    if scores.modes.keys() != set(KINDS):
                        raise ValueError(f"runs.*.{name}.contexts.{n}: expected every kind")
        return self

    @property
    def bounded(self) -> list[dict[str, _PolicyRun]]:
        """The runs of the seeds that have the floor and every ceiling."""
        return [run for run in self.runs if is_bounded(run)]

    @property
    def between(self) -> list[str]:
        """The policies that are held against floor and ceiling."""
        every = dict.fromkeys(name for run in self.bounded for name in run)
        return [name for name in every if not name.startswith("DPO, ")]

    def num_seeds(self, name: str) -> int:
        """How many seeds that policy was trained with."""
        return len(self._trained(name))

    def contexts(self, name: str) -> list[int]:
        """The numbers of choices it was measured after."""
        return sorted(self._trained(name)[0][name].contexts)

    def accuracy(self, name: str, n: int, kinds: Sequence[str]) -> Value:
        """Of one policy, the mean over `kinds` of its accuracy on each, which weighs them alike."""
        return _mean_of_kinds(
            [[run[name].contexts[n].modes[kind] for kind in kinds] for run in self._trained(name)]
        )

    def ceiling(self, kinds: Sequence[str]) -> Value:
        """The same of the policies dedicated to `kinds`, each on its own people."""
        return _mean_of_kinds(
            [[run[f"DPO, {kind}"].contexts[0] for kind in kinds] for run in self.bounded]
        )

    def _trained(self, name: str) -> list[dict[str, _PolicyRun]]:
        return [run for run in self.bounded if name in run]


def _mean_of_kinds(by_run: Sequence[Sequence[_ModeScores]]) -> Value:
    means, errors = [], []
    for scores in by_run:
        means.append(statistics.fmean(score.accuracy for score in scores))
        known = [score.accuracy_se for score in scores if score.accuracy_se is not None]
        # Kinds are different people, so their errors are independent.
        whole = len(known) == len(scores)
        errors.append(sum(se**2 for se in known) ** 0.5 / len(scores) if whole else None)
    return of_runs(means, errors)


class _SwapConfig(Part):
    mixtures: list[float]


class _Condition(Part):
    tastes: Some[str, Value]
    nll_above_own_samples: float | None = None


class SwapTest(Part):
    """Written by `fssa evaluate`."""

    config: _SwapConfig
    num_prompts: int
    conditions: Some[str, _Condition]
    swap: Some[str, dict]

    @model_validator(mode="after")
    def complete(self) -> SwapTest:
        for taste in self.swap:
            for name in ("unmodulated", *self.names(taste)):
                condition = self.conditions.get(name)
                if condition is None or taste not in condition.tastes:
                    raise ValueError(f"conditions.{name}.tastes.{taste}: expected, not found")
                if name != "unmodulated" and condition.nll_above_own_samples is None:
                    raise ValueError(f"conditions.{name}.nll_above_own_samples: expected a number")
        return self

    @property
    def shares(self) -> list[float]:
        """Shares of the way from less to more, both ends included."""
        return [0.0, *sorted(self.config.mixtures), 1.0]

    def names(self, taste: str) -> list[str]:
        """The conditions from less to more, one for each of `shares`."""
        between = [f"mix {share:g}" for share in sorted(self.config.mixtures)]
        return [f"{taste} {name}" for name in ("less", *between, "more")]

    def tastes(self, taste: str) -> list[Value]:
        """The measured taste of the texts, from less to more."""
        return [self.conditions[name].tastes[taste] for name in self.names(taste)]

    def above_own_samples(self, taste: str) -> list[float]:
        """NLL a token of these texts above that of the unmodulated model's, nats."""
        found = [self.conditions[name].nll_above_own_samples for name in self.names(taste)]
        return [value for value in found if value is not None]


AnyPart = TypeVar("AnyPart", bound=Part)


def read_result(content: bytes, form: type[AnyPart], name: str) -> AnyPart:
    """What `form` takes of a result file called `name`.

    Raises:
        InputError: a file of another form; says where in it and what was expected.
    """
    try:
        return form.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = f"{place}: {first['msg']}" if place else first["msg"]
        raise InputError(f"{name}: not a result this figure is drawn from: {message}") from error
