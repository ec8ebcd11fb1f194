"""results.json, summary.md and the figures of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.targets import geomean, label, targets

Record = dict[str, Any]
NOT_MEASURED = "not measured"
_DRY_TITLE = "DRY RUN on a CPU in Triton's interpreter: no figure below is a measurement."
_LINES_AT_MOST = 2000


def write(folder: Path, results: dict[str, Any]) -> None:
    """All files of a run, anew; a half-written one never stands in for a whole one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("results.json", json.dumps(results, separators=(",", ":"), ensure_ascii=False) + "\n"),
        ("summary.md", summary(results)),
    ):
        draft = folder / f".{name}"
        draft.write_text(text, encoding="utf-8")
        draft.replace(folder / name)


def summary(results: dict[str, Any]) -> str:
    """Targets first, then every part, as Markdown."""
    dry = results["dry_run"]
    records = results["records"]
    lines = [f"**{_DRY_TITLE}**", ""] if dry else []
    lines += ["# GPU suite", "", f"{results['device']}, {_versions(results)}.", ""]
    lines += ["## Targets", "", *targets_table(results), ""]
    lines += ["## Limits", "", *_limits(results), ""]
    lines += ["## Correctness", "", *_correctness(records), ""]
    for title, part, rows in (
        ("Linears: what the targets ask for", "linears", _contest_rows),
        ("Whole-model decode", "decode", _decode_rows),
        ("Flatness in the table's size", "flatness", _contest_rows),
        ("Other ops", "other ops", _contest_rows),
        ("Linears: the full sweep", "sweep", _contest_rows),
    ):
        chosen = [record for record in records if record["part"] == part]
        lines += [f"## {title}", "", *_part(chosen, rows, dry), ""]
    return "\n".join(lines)


def targets_table(results: dict[str, Any]) -> list[str]:
    """One line a target: the geometric mean and the worst of what was measured."""
    dry = results["dry_run"]
    lines = ["| | target | measured (geometric mean) | worst | of | |", "|---|---|---|---|---|---|"]
    for target in targets():
        values = target.values(results["records"])
        if not values:
            lines.append(f"| {target.title} | {target.goal} | {NOT_MEASURED} | | | |")
            continue
        where, worst = target.worst(values)
        verdict = "dry run" if dry else "met" if target.met(values) else "**missed**"
        lines.append(
            f"| {target.title} | {target.goal} | "
            f"{_figure(geomean(v for _, v in values), dry)} | {_figure(worst, dry)} ({where}) | "
            f"{len(values)} | {verdict} |"
        )
    return lines


def headline(results: dict[str, Any]) -> str:
    """What is printed at the end."""
    lines = [_DRY_TITLE] if results["dry_run"] else []
    lines += [*targets_table(results), "", *_limits(results), ""]
    decode = [record for record in results["records"] if record["part"] == "decode"]
    lines += [*_part(decode, _decode_rows, results["dry_run"])[:40], ""]
    lines += _correctness(results["records"])[:40]
    missing: dict[str, int] = {}
    for record in results["records"]:
        statuses = [record["status"]] if "status" in record else []
        statuses += [side["status"] for side in record["sides"].values()]
        for status in statuses:
            if status != "ok":
                where = f"{record['part']}: {status}"
                missing[where] = missing.get(where, 0) + 1
    lines += [f"{count} x {what[:200]}" for what, count in list(missing.items())[:25]]
    return "\n".join(lines)


def _versions(results: dict[str, Any]) -> str:
    parts = [f"{name} {results[name]}" for name in ("capability", "driver", "torch", "triton")]
    return ", ".join([*parts, f"commit {results['commit'] or 'unknown'}"])


def _limits(results: dict[str, Any]) -> list[str]:
    dry, limits = results["dry_run"], results["limits"]
    rows = (
        ("device-to-device copy, read and write", "copy", 1e9, "GB/s"),
        ("bf16 matrix product", "product", 1e12, "TFLOP/s"),
    )
    return [
        f"* {title}: {_figure(limits[name] / unit, dry)} {name_of_unit}"
        if name in limits
        else f"* {title}: {NOT_MEASURED}"
        for title, name, unit, name_of_unit in rows
    ]


def _correctness(records: Sequence[Record]) -> list[str]:
    lines = []
    for record in records:
        if record["part"] != "correctness":
            continue
        for op, counts in record.get("checked", {}).items():
            wrong = [f for f in record["faults"] if f["case"].startswith(f"{op}-")]
            told = ", ".join(f"{count} on {backend}" for backend, count in counts.items())
            lines.append(f"* {op}: {told or 'nothing checked'}; {len(wrong)} wrong")
            lines += [f"  * wrong: {f['case']} on {f['backend']}: {f['fault']}" for f in wrong[:5]]
        if record["status"] != "ok":
            lines.append(f"* {record['status']}")
    return lines or [NOT_MEASURED]


def _part(records: Sequence[Record], rows: Any, dry: bool) -> list[str]:
    if not records:
        return [NOT_MEASURED]
    header, cells = rows
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for record in records:
        if not record["sides"]:
            lines.append(f"| {label(record)} | {record.get('status', NOT_MEASURED)} |")
        for name, side in record["sides"].items():
            if "time_us" in side:
                shown = [*cells(record, side)]
                shown = [_figure(v, dry) if isinstance(v, float) else v for v in shown]
            else:
                shown = [side["status"]]
            lines.append(f"| {label(record)} | {name} | {' | '.join(shown)} |")
    if len(lines) > _LINES_AT_MOST:
        lines = [*lines[:_LINES_AT_MOST], "", "The rest is in results.json."]
    return lines


def _cells(record: Record, side: Record) -> list[Any]:
    figures = [float(side[name]) for name in ("time_us", "p20_us", "p80_us", "gb_s", "tflop_s")]
    return [*figures, *(_optional(side, name) for name in ("of_limit", "ratio")), _how(side)]


def _decode_cells(record: Record, side: Record) -> list[Any]:
    tokens = record["key"]["B"] / side["time_us"] * 1e6
    return [
        tokens,
        float(side["time_us"]),
        *(_optional(side, n) for n in ("of_limit", "ratio")),
        _how(side),
    ]


def _how(side: Record) -> str:
    return "; ".join(part for part in (side.get("note"), side.get("how")) if part)


_COMMON = ("problem", "side")
_contest_rows = (
    (*_COMMON, "µs", "p20", "p80", "GB/s", "TFLOP/s", "of the limit", "÷ base", "how"),
    _cells,
)
_decode_rows = (
    (*_COMMON, "tokens/s", "µs a step", "of the weights' stream", "÷ base only", "how"),
    _decode_cells,
)


def _optional(side: Record, name: str) -> float | str:
    return float(side[name]) if name in side else NOT_MEASURED


def _figure(value: float, dry: bool) -> str:
    return f"{value:.4g} (dry run)" if dry else f"{value:.4g}"
