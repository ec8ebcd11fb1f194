"""``fssa demo``: several users, one prompt, one batch, and the proof that nobody is mixed up."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from .conditioning.merge import merged, reference_answer_logprobs
from .conditioning.shipped import shipped_conditioning
from .conditioning.user_weights import UserWeights
from .errors import InputError
from .files import check_writable, write_atomically
from .llm import LLM
from .models.language_model import LanguageModel
from .models.pull import DEFAULT_MODEL
from .request import Completion, SamplingParams
from .training.tastes import TASTES, describe
from .users.examples import ExampleUser, read_users

USERS_FILE = "example_users.json"
DEFAULT_PROMPT = "What should I see in Paris?"


@dataclass(frozen=True)
class DemoOptions:
    """What ``fssa demo`` is asked for; see ``fssa demo --help``."""

    model: str = DEFAULT_MODEL
    conditioning: Path | None = None
    users_file: Path | None = None
    num_users: int | None = None
    prompt: str = DEFAULT_PROMPT
    max_tokens: int = 96
    dtype: str = "float32"
    device: str = "cpu"
    json_file: Path | None = None


def run_demo(options: DemoOptions, console: Console) -> dict[str, Any]:
    """Run it, write the JSON if wanted, print it; returns what the JSON holds.

    Raises:
        InputError: as the loaders do, more users wanted than there are, an unknown taste, or no
            place for the JSON.
    """
    folder = options.conditioning or shipped_conditioning(options.model)
    if folder is None:
        raise InputError(
            f"no conditioning ships for {options.model!r} (only for {DEFAULT_MODEL}); "
            "train one with `fssa train policy` and name it with --conditioning"
        )
    users = _pick(read_users(options.users_file or folder / USERS_FILE), options.num_users)
    if not options.prompt.strip():
        raise InputError("--prompt: expected some text, got none")
    tastes = [_described(user) for user in users]
    if options.json_file is not None:
        check_writable(options.json_file)
    about = f"  {options.model}  ({options.dtype}, {options.device})"
    console.print(Text.assemble(("model", "bold"), about))
    model = LanguageModel.load(
        options.model,
        dtype=options.dtype,
        device=options.device,
        show_progress=console.is_terminal,
    )
    # Without the prefix cache: a user alone computes their prompt anew.
    llm = LLM(model, folder, max_batch_size=1 + len(users), prefix_cache=False)
    people = _infer(llm, users, console)
    rows = [None, *people]  # the first row is nobody's: what the unmodulated model says
    sampling = SamplingParams(max_tokens=options.max_tokens)
    warm_up = llm.request(options.prompt, sampling=SamplingParams(max_tokens=2))
    llm.run([warm_up])  # the first pass pays for things that are not generation
    batched, batched_seconds = _together(llm, options.prompt, rows, sampling, console)
    solo, solo_seconds = _alone(llm, options.prompt, rows, batched, console)
    merged_logprobs = _merged(llm, options.prompt, rows, batched, console)
    num_tokens = sum(len(completion.tokens) for completion in batched)
    texts = [model.decode(completion.tokens).strip() for completion in batched]
    result = {
        "model": options.model,
        "device": options.device,
        "dtype": options.dtype,
        # Why steps are not replayed from a recording; null if they are.
        "eager_reason": llm.engine.runner.eager_reason,
        "prompt": options.prompt,
        "users": [
            {
                "name": user.name,
                "choices": [choice._asdict() for choice in user.choices],
                "taste": taste,
                "text": text,
            }
            for user, taste, text in zip(users, tastes, texts[1:], strict=True)
        ],
        "unmodulated_text": texts[0],
        "batch_rows": len(rows),
        "distinct_users": len({person.fingerprint for person in people}),
        "num_tokens": num_tokens,
        "max_abs_logprob_diff_vs_solo": _largest_difference(batched, [c.logprobs for c in solo]),
        "max_abs_logprob_diff_vs_merged": _largest_difference(batched, merged_logprobs),
        "tokens_per_s_batched": num_tokens / batched_seconds,
        "tokens_per_s_one_by_one": num_tokens / solo_seconds,
        "taste_scores": [
            {
                "name": user.name,
                "user": _tastes(user, text),
                "unmodulated": _tastes(user, texts[0]),
            }
            for user, text in zip(users, texts[1:], strict=True)
        ],
    }
    if options.json_file is not None:
        write_atomically(options.json_file, (json.dumps(result, indent=2) + "\n").encode())
    _print(result, console)
    return result


def _pick(users: Sequence[ExampleUser], wanted: int | None) -> list[ExampleUser]:
    if wanted is None:
        return list(users)
    if not 1 <= wanted <= len(users):
        raise InputError(f"--users: expected 1 to {len(users)} (so many are known), got {wanted}")
    return list(users[:wanted])


def _described(user: ExampleUser) -> str | None:
    try:
        return describe(user.weights) if user.weights else None
    except ValueError as error:
        raise InputError(f"user {user.name!r}: {error}") from error


def _infer(llm: LLM, users: Sequence[ExampleUser], console: Console) -> list[UserWeights]:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading each user's choices", total=len(users))
        people = []
        for user in users:
            people.append(llm.users.infer(user.name, user.choices).weights)
            progress.advance(task)
    return people


def _together(
    llm: LLM,
    prompt: str,
    rows: Sequence[UserWeights | None],
    sampling: SamplingParams,
    console: Console,
) -> tuple[list[Completion], float]:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"one batch, {len(rows)} rows", total=len(rows))
        start = time.perf_counter()
        completions = llm.run(
            [llm.request(prompt, row, sampling) for row in rows],
            on_finish=lambda _row, _completion: progress.advance(task),
        )
        return completions, time.perf_counter() - start


def _alone(
    llm: LLM,
    prompt: str,
    rows: Sequence[UserWeights | None],
    batched: Sequence[Completion],
    console: Console,
) -> tuple[list[Completion], float]:
    """Every row's text written again by its user alone: the same steps in a batch of one."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("the same, one user at a time", total=len(rows))
        completions = []
        start = time.perf_counter()
        for row, completion in zip(rows, batched, strict=True):
            again = llm.request(prompt, row, forced_tokens=completion.tokens)
            completions += llm.run([again])
            progress.advance(task)
        return completions, time.perf_counter() - start


def _merged(
    llm: LLM,
    prompt: str,
    rows: Sequence[UserWeights | None],
    batched: Sequence[Completion],
    console: Console,
) -> list[list[float]]:
    """The texts scored by transformers with each user's weights merged by hand."""
    from transformers import AutoModelForCausalLM

    model = llm.model
    reference = AutoModelForCausalLM.from_pretrained(
        model.folder, dtype=model.decoder.dtype, local_files_only=True
    ).eval()
    prompt_tokens = model.chat_tokens(prompt)
    logprobs = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("the same, weights merged by hand", total=len(rows))
        for row, completion in zip(rows, batched, strict=True):
            assert llm.conditioning is not None
            modulator = llm.conditioning.modulator
            table_row = modulator.layout.identity() if row is None else row.make_row()
            with merged(reference, modulator, table_row) as own:
                scored = reference_answer_logprobs(own, prompt_tokens, completion.tokens)
            logprobs.append(scored.tolist())
            progress.advance(task)
    return logprobs


def _largest_difference(batched: Sequence[Completion], others: Sequence[Sequence[float]]) -> float:
    return max(
        float((torch.tensor(completion.logprobs) - torch.tensor(other)).abs().max())
        for completion, other in zip(batched, others, strict=True)
    )


def _tastes(user: ExampleUser, text: str) -> dict[str, float]:
    return {name: TASTES[name].measure(text) for name in user.weights}


def _print(result: dict[str, Any], console: Console) -> None:
    """As `Text` where it came from outside: brackets in it are no markup."""
    title = Text(f"“{result['prompt']}”", "table.title")
    table = Table(title=title, show_lines=True, title_justify="left")
    table.add_column("user", style="bold", no_wrap=True)
    table.add_column("written for them, all in one batch", ratio=1)
    table.add_row("nobody\n[dim]unmodulated[/]", Text(result["unmodulated_text"]))
    for user in result["users"]:
        detail = f"{len(user['choices'])} choices"
        if user["taste"]:
            detail += f"\nlikes: {user['taste']}"
        about = Text.assemble(user["name"], "\n", (detail, "dim"))
        table.add_row(about, Text(user["text"]))
    console.print(table)
    scores = Table(title="how the texts measure", title_justify="left")
    scores.add_column("user", style="bold")
    scores.add_column("taste")
    scores.add_column("theirs", justify="right")
    scores.add_column("unmodulated", justify="right")
    for entry in result["taste_scores"]:
        for name, value in entry["user"].items():
            unmodulated = entry["unmodulated"][name]
            scores.add_row(Text(entry["name"]), name, f"{value:.2f}", f"{unmodulated:.2f}")
    if scores.row_count:
        console.print(scores)
    rows, users = result["batch_rows"], result["distinct_users"]
    console.print(
        f"{rows} rows in one batch, {users} different users and nobody. Largest difference of a "
        "token's log-probability (nats):\n"
        f"  from the same user alone                 {result['max_abs_logprob_diff_vs_solo']:.1e}\n"
        "  from that user's weights merged by hand  "
        f"{result['max_abs_logprob_diff_vs_merged']:.1e}\n"
        f"{result['tokens_per_s_batched']:.1f} tokens/s in one batch, "
        f"{result['tokens_per_s_one_by_one']:.1f} one user at a time."
    )
