"""The simulated people of a recipe's folder: their choices between sampled answers, their kinds."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from fssa_runtime.errors import InputError
from fssa_runtime.files import write_atomically
from fssa_runtime.training.answers import read_answers
from fssa_runtime.training.commands import choices_command
from fssa_runtime.training.population import PopulationConfig, candidates
from fssa_runtime.training.tastes import TasteScale
from fssa_runtime.training.trainer import load_config

ROOT = Path(__file__).resolve().parent.parent
ANSWERS = ROOT / "recipes" / "smollm2_135m" / "answers.jsonl"
POPULATION_FILE = "population.yaml"


def make_choices(recipes: Path, runs: Path) -> None:
    """The choices of the population in the folder ``recipes``, into the folder ``runs``.

    Raises:
        InputError: others lie there, and what was trained on them.
    """
    wanted = runs / "preferences.jsonl.gz"
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / wanted.name
        choices_command(ANSWERS, recipes / POPULATION_FILE, made)
        content = made.read_bytes()
    if wanted.is_file() and wanted.read_bytes() != content:
        raise InputError(f"{runs}: its choices are another population's; move the folder away")
    runs.mkdir(parents=True, exist_ok=True)
    write_atomically(wanted, content)


def pure_kinds(recipes: Path) -> tuple[TasteScale, Sequence[Mapping[str, float]]]:
    """The scale of that population's tastes, and the weights of who wants more, or less, of one."""
    config = load_config(recipes / POPULATION_FILE, PopulationConfig)
    answers = candidates(read_answers(ANSWERS), config.min_words)
    scale = TasteScale.fit([t for texts in answers.values() for t in texts], config.tastes)
    return scale, [
        {name: sign * config.strength * (name == taste) for name in config.tastes}
        for taste in config.tastes
        for sign in (1, -1)
    ]
