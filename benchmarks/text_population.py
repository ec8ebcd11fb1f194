"""Simulated people of a recipe's folder: their choices between sampled answers, their tastes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from fssa_runtime.errors import InputError
from fssa_runtime.files import write_atomically
from fssa_runtime.training.answers import read_answers
from fssa_runtime.training.commands import choices_command
from fssa_runtime.training.population import PopulationConfig, candidates, mode_of, user_weights
from fssa_runtime.training.tastes import TasteScale
from fssa_runtime.training.trainer import load_config

ROOT = Path(__file__).resolve().parent.parent
ANSWERS_FILE, POPULATION_FILE = "answers.jsonl", "population.yaml"

# Hidden weights over tastes, by the name of a user or a kind of users.
People = Mapping[str, Mapping[str, float]]


def answers_of(recipes: Path) -> Path:
    """The sampled answers in the folder; of one that has none, those of `recipes/text_study`."""
    own = recipes / ANSWERS_FILE
    return own if own.is_file() else ROOT / "recipes" / "text_study" / ANSWERS_FILE


def make_choices(recipes: Path, runs: Path) -> None:
    """The choices of the population in the folder ``recipes``, into the folder ``runs``.

    Raises:
        InputError: others lie there, and what was trained on them.
    """
    wanted = runs / "preferences.jsonl.gz"
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / wanted.name
        choices_command(answers_of(recipes), recipes / POPULATION_FILE, made)
        content = made.read_bytes()
    if wanted.is_file() and wanted.read_bytes() != content:
        raise InputError(f"{runs}: its choices are another population's; move the folder away")
    runs.mkdir(parents=True, exist_ok=True)
    write_atomically(wanted, content)


def scale_of(recipes: Path) -> TasteScale:
    """The units of that population's tastes."""
    config = load_config(recipes / POPULATION_FILE, PopulationConfig)
    answers = candidates(read_answers(answers_of(recipes)), config.min_words)
    return TasteScale.fit([t for texts in answers.values() for t in texts], config.tastes)


def everybody(recipes: Path) -> People:
    """All of that population."""
    return user_weights(load_config(recipes / POPULATION_FILE, PopulationConfig))


def pure_kinds(recipes: Path) -> People:
    """Who wants more, or less, of one of that population's tastes and cares for nothing else."""
    config = load_config(recipes / POPULATION_FILE, PopulationConfig)
    kinds = [
        {name: sign * config.strength * (name == taste) for name in config.tastes}
        for taste in config.tastes
        for sign in (1, -1)
    ]
    return {mode_of(weights): weights for weights in kinds}
