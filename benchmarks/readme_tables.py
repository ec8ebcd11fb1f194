"""Fill the README's tables from the committed result files.

    python -m benchmarks.readme_tables           # rewrite README.md
    python -m benchmarks.readme_tables --check   # exit 1 if it would change

Between ``<!-- table: NAME -->`` and ``<!-- end -->`` stands what ``TABLES[NAME]`` makes of the
files in ``benchmarks/results``. A figure nobody measured reads "not measured".
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.report import targets_table
from benchmarks.policies import acting, is_bounded
from benchmarks.rewards import mean_and_error
from benchmarks.serving import trace_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
NOT_MEASURED = "not measured"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, report by status")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = fill(before)
    if arguments.check:
        if before != after:
            print("README.md: tables differ from benchmarks/results", file=sys.stderr)
        return int(before != after)
    readme.write_text(after, encoding="utf-8")
    return 0


def fill(text: str) -> str:
    """The README with every table made anew."""

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", replace, text, flags=re.DOTALL)


def read(name: str) -> dict[str, Any] | None:
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def demo_texts() -> str:
    """What the demo printed: every user's text under the prompt."""
    result = read("demo_float32.json")
    if result is None:
        return NOT_MEASURED
    rows = [("nobody", "", result["unmodulated_text"])]
    rows += [(u["name"], u["taste"] or "", u["text"]) for u in result["users"]]
    lines = [
        f"Prompt: *{result['prompt']}*",
        "",
        "| user | likes | written for them |",
        "|---|---|---|",
    ]
    for name, taste, text in rows:
        shown = text.replace("|", "\\|").replace("\n\n", "<br>").replace("\n", "<br>")
        lines.append(f"| {name} | {taste} | {shown} |")
    return "\n".join(lines)


def demo_proof() -> str:
    """Equality and speed of the demo in both dtypes."""
    lines = ["| | float32 | bfloat16 |", "|---|---|---|"]
    results = [read("demo_float32.json"), read("demo_bfloat16.json")]
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("rows in the batch, of which different users", _rows),
        ("largest log-probability difference from the user alone, nats", _diff("solo")),
        ("… from the user's weights merged by hand, plain PyTorch", _diff("merged")),
        ("tokens/s, one batch", lambda r: f"{r['tokens_per_s_batched']:.1f}"),
        ("tokens/s, one user at a time", lambda r: f"{r['tokens_per_s_one_by_one']:.1f}"),
        ("ratio", _ratio),
    ]
    for label, cell in rows:
        cells = [NOT_MEASURED if r is None else cell(r) for r in results]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rows(result: dict[str, Any]) -> str:
    return f"{result['batch_rows']}, {result['distinct_users']}"


def _diff(kind: str) -> Callable[[dict[str, Any]], str]:
    return lambda result: f"{result[f'max_abs_logprob_diff_vs_{kind}']:.1e}"


def _ratio(result: dict[str, Any]) -> str:
    return f"{result['tokens_per_s_batched'] / result['tokens_per_s_one_by_one']:.2f}×"


def swap_test() -> str:
    """Tastes of texts written for users on both sides, and how good the texts are."""
    result = read("swap_test.json")
    if result is None:
        return NOT_MEASURED
    header = ["written for", *result["swap"], "words", "NLL a token", "− own samples", "loops"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for name, summary in result["conditions"].items():
        tastes = [_plus_minus(summary["tastes"][taste]) for taste in result["swap"]]
        above = summary.get("nll_above_own_samples")
        cells = [
            name,
            *tastes,
            _plus_minus(summary["words"], 1),
            f"{summary['nll_per_token']:.2f}",
            "" if above is None else f"{above:+.2f}",
            f"{100 * summary['loops']:.0f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for taste, swap in result["swap"].items():
        lines.append(
            f"* {taste}: more − less = {_plus_minus(swap['more_minus_less'])} over "
            f"{result['num_prompts']} held-out prompts; right way round on "
            f"{100 * swap['share_of_prompts_right']:.0f} %, wrong on "
            f"{100 * swap['share_of_prompts_wrong']:.0f} % of them (the rest tie)."
        )
    return "\n".join(lines)


def synthetic() -> str:
    """Rewards on the synthetic task beside the exact limit."""
    result = read("synthetic.json")
    if result is None:
        return NOT_MEASURED
    models = result["models"]
    contexts = list(models["NP-BTL"]["mean"])
    first = models["NP-BTL"]["runs"][0]["heldout"]["contexts"]
    lines = ["| choices | | " + " | ".join(contexts) + " |", "|---|---|" + "---|" * len(contexts)]
    for title, name, limit, scale, digits in (
        ("accuracy, %", "accuracy", "bayes_accuracy", 100, 2),
        ("NLL, nats", "nll", "bayes_nll", 1, 4),
    ):
        cells = [f"{scale * first[n][limit]:.{digits}f}" for n in contexts]
        lines.append(f"| {title} | best possible | {' | '.join(cells)} |")
        for model, measured in models.items():
            mean = measured["mean"]
            # What nobody's choices enter does not change with their number.
            fixed = len(mean) == 1
            cells = [
                _seeds(mean["0" if fixed else n][name], scale, digits) if n in mean or fixed else ""
                for n in contexts
            ]
            lines.append(f"| {title} | {model} | {' | '.join(cells)} |")
    cells = [_seeds(result["gap_closed"][n], 100, 1) for n in contexts]
    lines.append(f"| from BTL to dedicated, % of the way | NP-BTL | {' | '.join(cells)} |")
    ours = models["NP-BTL"]["mean"]
    for title, name, scale, digits in (
        ("worse kind, %", "worst_accuracy", 100, 2),
        ("calibration error, %", "calibration_error", 100, 2),
        ("active latent units", "active_latent_units", 1, 0),
    ):
        cells = [_seeds(ours[n][name], scale, digits) for n in contexts]
        lines.append(f"| {title} | NP-BTL | {' | '.join(cells)} |")
    return "\n".join(lines)


def identify() -> str:
    """The error in naming a user's kind beside the formula."""
    result = read("identify.json")
    if result is None:
        return NOT_MEASURED
    lines = ["| correlation ρ | " + " | ".join(result["models"]) + " |"]
    lines.append("|---|" + "---|" * len(result["models"]))
    for n in ("1", "3"):
        limits, cells = [], []
        for measured in result["models"].values():
            limit = measured["runs"][0]["heldout"]["contexts"][n]["bayes_identification_error"]
            limits.append(f"{100 * limit:.2f}")
            cells.append(_seeds(measured["mean"][n]["identification_error"], 100, 2))
        choices = "choice" if n == "1" else "choices"
        lines.append(f"| {n} {choices}, best possible, % | {' | '.join(limits)} |")
        lines.append(f"| {n} {choices}, NP-BTL, % | {' | '.join(cells)} |")
    return "\n".join(lines)


def people() -> str:
    """Held-out likelihood and accuracy on new real people, beside logit models."""
    tables = []
    for name in ("swissmetro", "electricity"):
        result = read(f"people_{name}.json")
        if result is None:
            tables.append(f"{name}: {NOT_MEASURED}")
            continue
        contexts = list(result["mean"])
        lines = [
            f"| {name}: NLL, nats (accuracy, %) | n = {' | '.join(contexts)} |",
            "|---|" + "---|" * len(contexts),
        ]
        for predictor in result["mean"][contexts[0]]:
            cells = []
            for n in contexts:
                entry = result["mean"][n][predictor]
                nll, accuracy = entry["nll"], entry["accuracy"]
                cells.append(f"{_plus_minus(nll, 3)} ({100 * accuracy['mean']:.1f})")
            lines.append(f"| {predictor} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def policies() -> str:
    """Implicit-reward accuracy of NP-DPO by n, between DPO for everybody and for a kind alone."""
    result = read("policies.json")
    if result is None:
        return NOT_MEASURED
    summary, sizes = result["summary"], result["numbers_a_user"]
    everybody = "DPO, everybody"
    held_against = [name for name in summary if "gap_closed" in summary[name]]
    contexts = list(summary[held_against[0]]["mean"])
    most = contexts[-1]
    columns = [*contexts, f"worst kind at {most}, %", f"NLL at {most}", f"of the gap at {most}, %"]
    lines = [
        f"| choices n | seeds | numbers a user: stored, acting | {' | '.join(columns)} |",
        "|---|---|---|" + "---|" * len(columns),
    ]

    def row(name: str, seeds: int, cells: list[str]) -> None:
        cells += [""] * (len(columns) - len(cells))
        numbers = f"{sizes[name]}, {acting(name, sizes[name])}" if name in sizes else ""
        lines.append(f"| {name}, % | {seeds} | {numbers} | {' | '.join(cells)} |")

    floor = summary[everybody]
    row(everybody, len(floor["seeds"]), [_seeds(floor["mean"]["0"]["accuracy"], 100, 1)])
    for name in held_against:
        mean = summary[name]["mean"]
        cells = [_seeds(mean[n]["accuracy"], 100, 1) for n in contexts]
        cells.append(_seeds(mean[most]["worst_accuracy"], 100, 1))
        cells.append(_seeds(mean[most]["nll"], 1, 3))
        cells.append(_seeds(summary[name]["gap_closed"][most], 100, 1))
        row(name, len(summary[name]["seeds"]), cells)
    dedicated = [name for name in summary if name not in (everybody, *held_against)]
    own = [
        statistics.fmean(runs[name]["contexts"]["0"]["accuracy"] for name in dedicated)
        for runs in result["runs"]
        if is_bounded(runs)
    ]
    row("DPO, each kind alone", len(own), [_seeds(mean_and_error(own), 100, 1)])
    return "\n".join(lines)


def questions() -> str:
    """Accuracy after some questions that were chosen, and after random ones."""
    counts = (0, 1, 2, 3, 4, 6, 8, 16)
    lines = [
        f"| answers | {' | '.join(map(str, counts))} | needed |",
        "|---|" + "---|" * (len(counts) + 1),
    ]
    for file, task in (
        ("questions.json", "synthetic"),
        ("questions_text.json", "text"),
        ("questions_shipped.json", "shipped"),
    ):
        result = read(file)
        if result is None:
            lines.append(f"| {task} | {NOT_MEASURED} |")
            continue
        mean, best = result["mean"], f"{100 * result['ceiling']:.1f}"
        for way, title in (("random", "random questions"), ("active", "chosen questions")):
            curve = mean["accuracy"][way]
            cells = [_seeds(curve[n], 100, 1) if n < len(curve) else "" for n in counts]
            needed = _seeds(mean["choices_needed"][way], 1, 2) or f"> {len(curve) - 1}"
            name = f"{task} (best {best}), {title}, %"
            lines.append(f"| {name} | {' | '.join(cells)} | {needed} |")
    return "\n".join(lines)


def user_updates() -> str:
    """What one more choice costs, and what all of them do."""
    result = read("user_updates.json")
    if result is None:
        return NOT_MEASURED
    lines = [
        "| choices known | one more, ms | … without reading its answers, ms | all anew, ms |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['known']} | {row['one_more_ms']:.0f} | {row['without_reading_ms']:.1f} | "
            f"{row['all_anew_ms']:.0f} |"
        )
    return "\n".join(lines)


def _seeds(value: dict[str, float | None], scale: float, digits: int) -> str:
    """Mean ± standard error over seeds, without the error where there is one seed."""
    mean, error = value["mean"], value["standard_error"]
    if mean is None:
        return ""
    shown = f"{scale * mean:.{digits}f}"
    return shown if error is None else f"{shown} ± {scale * error:.{digits}f}"


def implicit_reward() -> str:
    """Held-out accuracy of the shipped checkpoint's implicit reward."""
    result = read("policy.json")
    if result is None:
        return NOT_MEASURED
    contexts = result["heldout"]["contexts"]
    lines = ["| choices | " + " | ".join(contexts) + " |", "|---|" + "---|" * len(contexts)]
    cells = [f"{100 * e['accuracy']:.1f} ± {100 * e['accuracy_se']:.1f}" for e in contexts.values()]
    lines.append("| accuracy, % | " + " | ".join(cells) + " |")
    return "\n".join(lines)


SIDES = {
    "base only": "ours, base only",
    "one user": "ours, one user",
    "all distinct": "**ours, every row another user**",
    "llama_cpp": "llama.cpp, BF16, base only",
    "llama_cpp_f16": "llama.cpp, F16, base only",
    "vllm": "vLLM on the CPU, base only",
    "vllm_lora": "vLLM on the CPU, a LoRA of its own for each row",
    "hf": "transformers, base only",
    "peft": "PEFT, a LoRA of its own for each row",
}


def cpu_decode(file: str = "decode.json") -> str:
    """Tokens a second of every side, and how many times as fast every row another user is."""
    result = read(file)
    if result is None:
        return NOT_MEASURED
    columns = [(f"batch {b}", rows) for b, rows in result["summary"]["decode"].items()]
    if result["summary"]["prefill"]:
        columns.append((f"prefill {result['prefill_tokens']}", result["summary"]["prefill"]))
    lines = [f"| tokens/s | {' | '.join(title for title, _ in columns)} |"]
    lines.append("|---|" + "---|" * len(columns))
    sides = {name for _, rows in columns for name in rows} | set(result["absent"])
    for name, label in SIDES.items():
        if name not in sides:
            continue
        cells = []
        for _, rows in columns:
            if name not in rows:
                cells.append(NOT_MEASURED)
                continue
            ratio = (
                "" if name == "all distinct" else f" ({rows[name]['all_distinct_over_this']:.2f}×)"
            )
            cells.append(f"{rows[name]['tokens_per_s']:.0f}{ratio}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    shares = [
        f"{rows['all distinct']['fraction_of_stream']:.0%} at {title}"
        for title, rows in columns
        if "fraction_of_stream" in rows["all distinct"]
    ]
    samples = [s for v in result["raw"]["limits"].values() for s in v["stream_bytes_per_s"]]
    lines += [
        "",
        f"Of what the same threads read in the same run ({statistics.median(samples) / 1e9:.1f} "
        "GB/s in the median; the ratios are taken round by round), every row another user uses "
        f"{', '.join(shares)}.",
    ]
    weights = result["summary"].get("weight_bytes")
    if weights is not None and weights["kept"] < weights["checkpoint"]:
        lines[-1] += (
            " Its weights lie in memory compressed, to the bit: "
            f"{weights['kept'] / weights['checkpoint']:.0%} of their bytes in the checkpoint."
        )
    return "\n".join(lines)


SERVING_SIDES = {
    "base only": "ours, base only",
    "one user": "ours, one user",
    "all distinct": "**ours, every request another user**",
    "all distinct, one at a time": "ours, one request at a time",
    "llama_cpp": SIDES["llama_cpp"],
    "vllm": SIDES["vllm"],
    "vllm_lora": "vLLM on the CPU, a LoRA of its own for each user",
    "hf": SIDES["hf"],
}


def serving() -> str:
    """Throughput with everything waiting, and times to tokens under every load."""
    result = read("serving.json")
    if result is None:
        return NOT_MEASURED
    loads, settings = result["open"], result["settings"]
    titles = [
        f"{load['arrivals']}, {load['num_requests']} at {load['rate']:.1f} requests/s: "
        "first token, then (ms), in time"
        for load in loads
    ]
    columns = [f"tokens/s, {settings['requests']} waiting", *titles]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for side, label in SERVING_SIDES.items():
        if side not in result["closed"]:
            continue
        speed = statistics.median(run["tokens_per_s"] for run in result["closed"][side])
        ratio = result["all_distinct_over"].get(side)
        cells = [f"{speed:.0f}" + ("" if ratio is None else f" ({ratio:.2f}×)")]
        cells += [_times(load["sides"].get(side)) for load in loads]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    asked = list(trace_of(argparse.Namespace(**settings), "poisson", 1.0).arrivals())
    prompt, answer = (
        statistics.fmean(getattr(one, name) for one in asked)
        for name in ("prompt_tokens", "output_tokens")
    )
    lines += [
        "",
        f"Those waiting have {prompt:.0f} tokens and {answer:.0f} to write on average; one at a "
        f"time are the first {min(settings['concurrency'], len(asked))} of them, and those of the "
        f"loads are from {' and '.join(str(load['num_users']) for load in loads)} users. "
        "In brackets: how many times as fast every request another user is, round by round. Times "
        "are medians, in brackets the 95th percentile; in time are requests whose first token "
        f"came within {settings['ttft']:,.0f} ms and every other within {settings['itl']:,.0f} ms "
        f"of the one before. The loads are {settings['load']:.0%} of what is held by: "
        + "; ".join(dict.fromkeys(SERVING_SIDES[load["share_of"]].strip("*") for load in loads))
        + ".",
    ]
    if result["absent"]:
        lines[-1] += f" Not measured: {', '.join(result['absent'])}."
    return "\n".join(lines)


def _times(runs: list[dict[str, float]] | None) -> str:
    if runs is None:
        return ""
    names = ("ttft_ms_p50", "ttft_ms_p95", "itl_ms_p50", "itl_ms_p95", "good_share")
    a, b, c, d, good = (statistics.median(run[name] for run in runs) for name in names)
    return f"{a:.0f} ({b:.0f}), {c:.0f} ({d:.0f}), {good:.0%}"


def gpu() -> str:
    """The targets for a GPU, a table for every device that has run the suite; or one without."""
    runs = sorted(RESULTS.parent.glob("*/gpu_suite/results.json"))
    tables = []
    for path in runs:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["dry_run"]:
            raise ValueError(f"{path}: a dry run is no measurement")
        tables.append("\n".join([f"{result['device']}:", "", *targets_table(result)]))
    nothing = {"dry_run": False, "records": []}
    return "\n\n".join(tables or ["\n".join(targets_table(nothing))])


def _plus_minus(value: dict[str, float], digits: int = 2) -> str:
    return f"{value['mean']:.{digits}f} ± {value['standard_error']:.{digits}f}"


TABLES: dict[str, Callable[[], str]] = {
    "demo_texts": demo_texts,
    "demo_proof": demo_proof,
    "swap_test": swap_test,
    "cpu_decode": cpu_decode,
    "cpu_decode_avx2": lambda: cpu_decode("decode_avx2.json"),
    "gpu": gpu,
    "serving": serving,
    "synthetic": synthetic,
    "identify": identify,
    "people": people,
    "policies": policies,
    "questions": questions,
    "user_updates": user_updates,
    "implicit_reward": implicit_reward,
}


if __name__ == "__main__":
    sys.exit(main())
