"""How figures look: one size, one set of colours, and SVG that does not change from run to run."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Literal

from benchmarks.figure_data import Value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches; 7.6 of them are about as wide as a README is shown.
WIDTH, HEIGHT = 7.6, 3.2
STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.5,
    "lines.markersize": 5.0,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    # Letters as outlines look the same whatever fonts the reader has.
    "svg.fonttype": "path",
    "svg.hashsalt": "fssa",
}
# Okabe and Ito's, told apart by people who see fewer colours; every one has a marker and a pattern
# of its own besides.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
PATTERNS = ("--", ":", "-.", (0, (1, 3)), (0, (8, 2)), (0, (4, 1, 1, 1)))
LIMIT, LEVEL = "black", "#777777"
Look = tuple[str, str]


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A colour and a marker for every series."""
    return dict(zip(names, cycle(zip(COLORS, MARKERS, strict=True)), strict=False))


def panels(
    rows: int,
    columns: int,
    height: float = HEIGHT,
    *,
    same_y: Literal["none", "all"] = "none",
) -> tuple[Figure, list[Axes]]:
    """An empty figure of the common width and its panels, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharey=same_y).flat)


def series(
    axes: Axes,
    xs: Sequence[float],
    values: Sequence[Value],
    label: str,
    look: Look,
    *,
    scale: float = 1.0,
    joined: bool = True,
) -> None:
    """Measured points with their standard errors; not joined where an exact curve runs by them."""
    color, marker = look
    ys = [scale * value.mean for value in values]
    # Points beside the curve they should lie on are hollow, so that it shows through.
    fill = None if joined else "none"
    line = "-" if joined else "none"
    axes.plot(xs, ys, color=color, marker=marker, linestyle=line, markerfacecolor=fill, label=label)
    errors = [value.standard_error for value in values]
    bars = [(x, y, e) for x, y, e in zip(xs, ys, errors, strict=True) if e is not None]
    if bars:
        x, y, e = zip(*bars, strict=True)
        lengths = [abs(scale) * error for error in e]
        axes.errorbar(x, y, yerr=lengths, fmt="none", ecolor=color, elinewidth=1.0, capsize=2.0)


def legend(figure: Figure, axes: Axes, columns: int, title: str) -> None:
    """What the lines of `axes` are, below all panels that share them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, title=title)


def to_svg(figure: Figure, title: str, source: str) -> bytes:
    """The figure as SVG without date or version, `source` in its metadata."""
    content = io.BytesIO()
    metadata = {"Date": None, "Creator": None, "Title": title, "Source": source}
    figure.savefig(content, format="svg", metadata=metadata)
    return content.getvalue()
