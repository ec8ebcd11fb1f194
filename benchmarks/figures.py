"""Figures of the committed results, as SVG.

    python -m benchmarks.figures                      # of every result there is
    python -m benchmarks.figures --only swap_test     # of this one; an error if it is not there

A figure is drawn from one file in `benchmarks/results/cpu` and carries that file's SHA-256 in its
metadata. No date or version goes in and identifiers are hashed with a fixed salt: with one version
of matplotlib the same result gives the same bytes. Bars are one standard error up and down.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figure_data import (
    Identify,
    Part,
    People,
    Policies,
    Questions,
    SwapTest,
    Synthetic,
    read_result,
)
from benchmarks.figure_style import (
    COLORS,
    HEIGHT,
    LEVEL,
    LIMIT,
    MARKERS,
    PATTERNS,
    STYLE,
    legend,
    looks,
    panels,
    series,
    to_svg,
)
from benchmarks.policies import EVERYBODY, KINDS
from fssa_runtime.errors import InputError
from fssa_runtime.files import write_atomically
from fssa_runtime.training.synthetic import Population

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "cpu"
CHOICES = "choices n of a user"
PEOPLE = {"swissmetro": "travellers (Swissmetro)", "electricity": "households (Electricity)"}
TASTE_UNITS = {
    "length": "length, log(1 + words)",
    "lists": "lists, share of lines",
}


def draw_synthetic(result: Synthetic) -> Figure:
    """Accuracy and NLL against n, beside the exact limit and the models that see no choices."""
    figure, both = panels(1, 2, HEIGHT + 0.4)
    models = result.models
    conditioned = looks(name for name, model in models.items() if len(model.mean) > 1)
    flat = [n for n in models if n not in conditioned and not n.startswith("dedicated")]
    contexts = sorted({n for name in conditioned for n in models[name].mean})
    every = list(range(max(contexts, default=0) + 1))
    limit = result.population
    for axes, name, exact, scale, title in (
        (both[0], "accuracy", limit.bayes_accuracy, 100.0, "accuracy on new pairs, %"),
        (both[1], "nll", limit.bayes_nll, 1.0, "NLL, nats a choice"),
    ):
        axes.plot(every, [scale * exact(n) for n in every], color=LIMIT, label="best possible")
        for label, look in conditioned.items():
            mean = models[label].mean
            values = [getattr(mean[n], name) for n in sorted(mean)]
            series(axes, sorted(mean), values, label, look, scale=scale, joined=False)
        for i, label in enumerate(flat, start=len(conditioned)):
            (only,) = models[label].mean.values()
            level = scale * getattr(only, name).mean
            pattern = PATTERNS[i % len(PATTERNS)]
            axes.axhline(level, color=COLORS[i % len(COLORS)], linestyle=pattern, label=label)
        own = result.dedicated(name)
        if own is not None:
            axes.axhline(scale * own.mean, color=LEVEL, lw=1.0, label="dedicated to one kind")
        axes.set_xticks(contexts)
        axes.set_xlabel(CHOICES)
        axes.set_ylabel(title)
    legend(figure, both[0], 3, f"mean ± s.e. over {result.seeds} seeds")
    return figure


def draw_identify(result: Identify) -> Figure:
    """The error in naming a user's kind against ρ, measured beside ½(½ + arcsin(ρ)/π)ⁿ."""
    figure, (axes,) = panels(1, 1, HEIGHT + 0.2)
    # Densest at the ends, where the curves are steep.
    grid = [math.sin(math.pi / 2 * i / 100) for i in range(-100, 101)]
    models = sorted(result.models.values(), key=lambda model: model.rho)
    # Without choices nobody can tell: ½ for every ρ.
    contexts = sorted(n for n in models[0].mean if n > 0)
    for n, look in looks(map(str, contexts)).items():
        exact = [100 * Population("normal", rho).identification_error(int(n)) for rho in grid]
        axes.plot(grid, exact, color=look[0], lw=1.0, label=f"n = {n}, best possible")
        values = [model.mean[int(n)].identification_error for model in models]
        xs = [model.rho for model in models]
        series(axes, xs, values, f"n = {n}, NP-BTL", look, scale=100, joined=False)
    axes.set_xlabel("correlation ρ of what the two kinds choose by")
    axes.set_ylabel("error in naming the kind, %")
    axes.set_xticks([-1, -0.5, 0, 0.5, 1])
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", title=f"mean ± s.e. over {result.seeds} seeds")
    return figure


def draw_people(result: People) -> Figure:
    """Held-out log-likelihood and accuracy of new people's choices against n."""
    figure, both = panels(1, 2, HEIGHT + 0.4)
    contexts = sorted(result.mean)
    for axes, name, scale, title in (
        (both[0], "nll", -1.0, "held-out log-likelihood, nats a choice"),
        (both[1], "accuracy", 100.0, "held-out accuracy, %"),
    ):
        for label, look in looks(result.mean[contexts[0]]).items():
            values = [getattr(result.mean[n][label], name) for n in contexts]
            series(axes, contexts, values, label, look, scale=scale)
        axes.set_xticks(contexts)
        axes.set_xlabel("choices n of a new person")
        axes.set_ylabel(title)
    people = PEOPLE.get(result.table, result.table)
    legend(figure, both[0], 2, f"{people}, mean ± s.e. over {len(result.folds)} folds")
    return figure


def draw_questions(result: Questions) -> Figure:
    """Accuracy against the number of answers, to chosen questions and to random ones."""
    figure, (axes,) = panels(1, 1)
    ways = {"chosen questions": "active", "random questions": "random"}
    start = result.mean.accuracy.random[0].mean
    wanted = 100 * (start + result.share_of_ceiling * (result.ceiling - start))
    share = f"{100 * result.share_of_ceiling:.0f} % of the way to {100 * result.ceiling:.1f} %"
    axes.axhline(wanted, color=LEVEL, lw=1.0, label=share)
    for (label, way), look in zip(ways.items(), looks(ways).values(), strict=True):
        values = getattr(result.mean.accuracy, way)
        needed = getattr(result.mean.choices_needed, way).mean
        there = "never there" if needed is None else f"there after {needed:.1f} answers"
        label = f"{label}, {there}"
        series(axes, range(len(values)), values, label, look, scale=100)
    axes.set_xlabel(f"answers of a user (mean ± s.e. over {len(result.runs)} seeds)")
    axes.set_ylabel("accuracy on new pairs, %")
    axes.legend(loc="lower right")
    return figure


def draw_policies(result: Policies) -> Figure:
    """Implicit-reward accuracy against n between floor and ceiling: all kinds, then each."""
    shown = [("mean of the kinds", KINDS), *((kind, (kind,)) for kind in KINDS)]
    # One place more than panels, for the legend.
    columns = 3
    rows = -(-(len(shown) + 1) // columns)

    def label(name: str) -> str:
        seeds = result.num_seeds(name)
        return name if seeds == 1 else f"{name}, {seeds} seeds"

    figure, every = panels(rows, columns, 0.4 + 2.3 * rows, same_y="all")
    for axes, (title, members) in zip(every, shown, strict=False):
        for name, look in looks(result.between).items():
            contexts = result.contexts(name)
            values = [result.accuracy(name, n, members) for n in contexts]
            series(axes, contexts, values, label(name), look, scale=100)
            axes.set_xticks(contexts)
        ceiling = result.ceiling(members).mean
        axes.axhline(100 * ceiling, color=LIMIT, lw=1.0, ls="--", label="DPO, this kind alone")
        floor = result.accuracy(EVERYBODY, 0, members).mean
        axes.axhline(100 * floor, color=LEVEL, lw=1.0, label=EVERYBODY)
        axes.set_title(title)
        axes.set_xlabel("choices n")
        axes.tick_params(labelleft=True)
    for axes in every[len(shown) :]:
        axes.set_axis_off()
    handles, labels = every[0].get_legend_handles_labels()
    title = "mean ± s.e. over seeds,\nof one over new people"
    every[len(shown)].legend(handles, labels, loc="center", title=title)
    figure.supylabel("implicit-reward accuracy, %", fontsize="medium")
    return figure


def draw_swap_test(result: SwapTest) -> Figure:
    """The measured taste of texts from less to more, and their NLL above the model's own."""
    figure, every = panels(len(result.swap), 2, 0.5 + 2.4 * len(result.swap))
    shares = result.shares
    ticks = ["less", *(f"{share:g}" for share in shares[1:-1]), "more"]
    look = color, marker = COLORS[0], MARKERS[0]
    for row, taste in enumerate(result.swap):
        left, right = every[2 * row : 2 * row + 2]
        # One scale for every taste: a small loss shall look small.
        if row > 0:
            right.sharey(every[1])
        series(left, shares, result.tastes(taste), "written for users", look)
        own = result.conditions["unmodulated"].tastes[taste].mean
        left.axhline(own, color=LEVEL, ls="--", label="unmodulated model")
        left.set_ylabel(TASTE_UNITS.get(taste, taste))
        right.plot(shares, result.above_own_samples(taste), color=color, marker=marker)
        right.axhline(0.0, color=LEVEL, ls="--")
        right.set_ylabel("NLL above own samples,\nnats a token")
        for axes in (left, right):
            axes.set_xticks(shares, ticks)
            axes.set_xlabel(f"{taste} wanted, and mixtures between")
    legend(figure, every[0], 2, f"mean ± s.e. over {result.num_prompts} new prompts")
    return figure


@dataclass(frozen=True)
class Drawing:
    """What is drawn of a result file: the form it must have, and how."""

    form: type[Part]
    draw: Callable[[Any], Figure]
    title: str


FIGURES = {
    "synthetic": Drawing(Synthetic, draw_synthetic, "Rewards on the synthetic task"),
    "identify": Drawing(Identify, draw_identify, "Naming the kind of a user"),
    "people_swissmetro": Drawing(People, draw_people, "Choices of new travellers"),
    "people_electricity": Drawing(People, draw_people, "Choices of new households"),
    "questions": Drawing(Questions, draw_questions, "Chosen and random questions"),
    "questions_text": Drawing(Questions, draw_questions, "Chosen and random questions on text"),
    "questions_shipped": Drawing(
        Questions, draw_questions, "Chosen and random questions to the reward that ships"
    ),
    "policies": Drawing(Policies, draw_policies, "Policies between floor and ceiling"),
    "swap_test": Drawing(SwapTest, draw_swap_test, "The swap test"),
    "text_study_swap_test": Drawing(SwapTest, draw_swap_test, "The swap test of the text study"),
}


def render(name: str, path: Path) -> bytes:
    """The figure `name` of a result file, as SVG.

    Raises:
        InputError: the file is not what this figure is drawn from.
    """
    import matplotlib.style

    drawing = FIGURES[name]
    content = path.read_bytes()
    result = read_result(content, drawing.form, str(path))
    # What a reader has set up for figures of their own does not show in these.
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = drawing.draw(result)
        return to_svg(figure, drawing.title, source_of(name, content))


def source_of(name: str, content: bytes) -> str:
    """What a figure says it was drawn from."""
    return f"{FOLDER}/{name}.json, SHA-256 {hashlib.sha256(content).hexdigest()}"


def draw_all(results: Path, out: Path, only: str | None) -> list[Path]:
    """Draw the results there are, or the one that is asked for; the files written.

    Raises:
        InputError: no matplotlib, no result to draw, or one of another form, for which nothing is
            written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "matplotlib is not installed: pip install -c constraints.txt -e '.[bench]'"
        )
    paths = {name: results / FOLDER / f"{name}.json" for name in FIGURES}
    if only is not None:
        if not paths[only].is_file():
            raise InputError(f"--only {only}: there is no {paths[only]}")
        paths = {only: paths[only]}
    found = {name: path for name, path in paths.items() if path.is_file()}
    if not found:
        raise InputError(f"{results / FOLDER}: none of {', '.join(p.name for p in paths.values())}")
    pictures = {name: render(name, path) for name, path in found.items()}
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        write_atomically(out / f"{name}.svg", picture)
    return [out / f"{name}.svg" for name in pictures]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    results = ROOT / "benchmarks" / "results"
    parser.add_argument("--results", type=Path, default=results, help="folder of result files")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    parser.add_argument("--only", choices=list(FIGURES), help="draw this one")
    arguments = parser.parse_args(argv)
    try:
        for path in draw_all(arguments.results, arguments.out, arguments.only):
            print(path)
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
