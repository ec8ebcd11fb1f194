"""What it costs to know somebody by one more choice, and what to know them anew.

    python -m benchmarks.user_updates --json benchmarks/results/cpu/user_updates.json

The default model and the checkpoint that ships; choices between sampled answers. A user who has
made n choices makes another: `Users.add_choices`, the part of it that is not the base model reading
the two answers, and `Users.infer` of all n + 1. Both ways must lead to the same latent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cpu_command import machine, numbers
from benchmarks.text_population import ROOT, answers_of
from fssa_runtime import LLM
from fssa_runtime.conditioning.beliefs import update_belief
from fssa_runtime.conditioning.choices import Choice, options_of
from fssa_runtime.conditioning.embedding import embed_options
from fssa_runtime.models.pull import DEFAULT_MODEL
from fssa_runtime.threads import set_threads
from fssa_runtime.training.answers import read_answers
from fssa_runtime.training.population import candidates

# Relative. Far less than one choice among thirty moves a latent.
EQUAL = 1e-4
SOMEBODY = "somebody"


def sampled_choices(count: int) -> list[Choice]:
    """One between two answers to each of as many prompts."""
    answers = candidates(read_answers(answers_of(ROOT / "recipes" / "smollm2_135m")), min_words=3)
    choices = [Choice(prompt, *texts[:2]) for prompt, texts in answers.items()]
    if len(choices) < count:
        raise ValueError(f"expected prompts for {count} choices, got {len(choices)}")
    return choices[:count]


def milliseconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def measure(llm: LLM, choices: Sequence[Choice]) -> dict[str, float]:
    """Milliseconds to learn the last of these choices, to do so without reading it, and to learn
    all of them.

    Raises:
        ValueError: the two ways lead to different latents.
    """
    users, conditioning = llm.users, llm.conditioning
    assert conditioning is not None
    *before, new = choices
    belief = users.infer(SOMEBODY, before).belief
    assert belief is not None
    added = milliseconds(lambda: users.add_choices(SOMEBODY, [new]))
    step_by_step = users[SOMEBODY].latent
    anew = milliseconds(lambda: users.infer(SOMEBODY, choices))
    at_once = users[SOMEBODY].latent
    apart = float((step_by_step - at_once).norm() / at_once.norm())
    if not apart <= EQUAL:
        raise ValueError(
            f"{len(choices)} choices: the latent of one more and that of all at once differ by "
            f"{apart:.1e} of their length"
        )
    chosen, rejected = embed_options(llm.model, conditioning.embedding, options_of([new])).split(1)

    def update() -> None:
        latent = update_belief(conditioning.encoder, belief, chosen, rejected).mean
        conditioning.blend([(1.0, latent)]).make_row()

    return {"one_more_ms": added, "without_reading_ms": milliseconds(update), "all_anew_ms": anew}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.user_updates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--known", type=numbers(0), default="1,10,30", help="choices made before (1,10,30)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="other choices each time (7)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, help="default: the physical cores")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args(arguments)
    known = options.known
    if options.repeats < 1:
        parser.error(f"--repeats: expected at least 1, got {options.repeats}")
    set_threads(options.threads)
    llm = LLM(DEFAULT_MODEL, dtype=options.dtype)
    choices = sampled_choices(max(known) + options.repeats)
    measure(llm, choices[:2])  # first calls pay for what is made once
    rows = []
    for n in known:
        runs = [measure(llm, choices[first : first + n + 1]) for first in range(options.repeats)]
        median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        rows.append({"known": n, **median, "runs": runs})
    tokens = [
        len(llm.model.chat_tokens(prompt)) + len(llm.model.answer_tokens(answer))
        for prompt, answer in options_of(choices)
    ]
    result = {
        "model": DEFAULT_MODEL,
        "dtype": options.dtype,
        "machine": machine(),
        "median_tokens_of_an_option": statistics.median(tokens),
        "rows": rows,
    }
    table = Table("choices known", "one more, ms", "without reading it, ms", "all anew, ms")
    for row in rows:
        names = ("one_more_ms", "without_reading_ms", "all_anew_ms")
        table.add_row(str(row["known"]), *(f"{row[name]:.1f}" for name in names))
    Console().print(table)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
