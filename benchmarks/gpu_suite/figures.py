"""PNG figures of a run, where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.targets import geomean, measured, quotient

Record = dict[str, Any]


def draw(folder: Path, results: dict[str, Any]) -> str:
    """Write the figures; the reason why there are none, or ""."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no figures: matplotlib is not installed"
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mark = "DRY RUN, no measurement: " if results["dry_run"] else ""
    for name, title, curves, axis in (
        ("ratio.png", "linears: time by cuBLAS base only", _ratios(results), "÷ cuBLAS"),
        ("decode.png", "decode of whole models", _decode(results), "tokens/s"),
    ):
        if not curves:
            continue
        figure, axes = plt.subplots(figsize=(8, 5), dpi=110)
        for label, points in curves.items():
            axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=label)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("M" if name == "ratio.png" else "B")
        axes.set_ylabel(axis)
        axes.set_title(f"{mark}{title}, {results['device']}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(folder / name)
        plt.close(figure)
    return ""


def _ratios(results: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Geometric mean over the linears of the targets' model, by side and M."""
    found: dict[str, dict[int, list[float]]] = {}
    for record in results["records"]:
        if record["part"] != "linears" or record["key"].get("R") != 16:
            continue
        tokens = record["key"]["M"]
        for side, label in (
            ("none 0", "ours, no term"),
            ("gated 1", "gated, one user"),
            (f"gated {tokens}", "gated, all distinct"),
            ("multi-lora 1", "multi-LoRA, one user"),
            (f"multi-lora {tokens}", "multi-LoRA, all distinct"),
        ):
            value = quotient(record, side, "cublas")
            if value is not None:
                found.setdefault(label, {}).setdefault(tokens, []).append(value)
    return {
        label: {tokens: geomean(values) for tokens, values in points.items()}
        for label, points in found.items()
    }


def _decode(results: dict[str, Any]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for record in results["records"]:
        if record["part"] != "decode":
            continue
        for side in record["sides"]:
            if measured(record, side) and not side.endswith("again"):
                label = f"{record['key']['model']}, {side}"
                batch = record["key"]["B"]
                rate = 1e6 * batch / record["sides"][side]["time_us"]
                found.setdefault(label, {})[batch] = rate
    return found
