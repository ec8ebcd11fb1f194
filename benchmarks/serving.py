"""Serving a trace of requests on this machine: base only, one user, every request another user.

    python -m benchmarks.serving --requests 64 --rounds 3 --json FILE

Two questions. **How much** (closed): all requests wait from the start, 32 answers are in flight,
and tokens a second count; beside it some of them one after another. **How long** (open): requests
arrive as a Poisson process at a share of what was just measured, users drawn by Zipf's law, and the
time to the first token, the time between tokens and the goodput count (requests a second whose
tokens came within the objectives). Sides are measured in turn, round after round, on the same
requests; the prefix cache is on where users come back, and off for the closed ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cpu_decode import machine
from benchmarks.modulated import LATENT_DIM, random_modulator
from fssa_runtime.conditioning.table import ModulationTable
from fssa_runtime.conditioning.user_weights import UserWeights
from fssa_runtime.engine.engine import Engine
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.models.pull import DEFAULT_MODEL
from fssa_runtime.planning.sketch import Sketch
from fssa_runtime.planning.trace import Arrival, Lengths, Trace
from fssa_runtime.request import Request, SamplingParams
from fssa_runtime.threads import set_threads

SIDES = ("base only", "one user", "all distinct")
ALONE = "all distinct, one at a time"


@dataclasses.dataclass
class Served:
    """What one run of a trace gave."""

    seconds: float
    num_tokens: int
    first_token: Sketch
    between_tokens: Sketch
    good: int

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    def summary(self) -> dict[str, float]:
        return {
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
            "goodput_per_s": self.good / self.seconds,
            **{
                f"{name}_ms_p{round(100 * share)}": 1e3 * sketch.quantile(share)
                for name, sketch in (("ttft", self.first_token), ("itl", self.between_tokens))
                for share in (0.5, 0.95, 0.99)
            },
        }


class Server:
    """One model, engines with and without modulation, and people."""

    def __init__(self, model: LanguageModel, options: argparse.Namespace) -> None:
        self.model, self.options = model, options
        self.modulator = random_modulator(model.decoder.config)
        self._people: dict[int, UserWeights] = {}

    def engine(self, side: str, *, prefix_cache: bool) -> Engine:
        batch = 1 if side == ALONE else self.options.concurrency
        limits: dict[str, Any] = {
            "max_batch_size": batch,
            "max_batch_tokens": max(batch, 512),
            "max_kv_tokens": batch * 2 * (self.options.prompt_tokens + self.options.output_tokens),
            "prefix_cache": prefix_cache,
        }
        decoder = self.model.decoder
        if side == "base only":
            return Engine(decoder, frozenset(), **limits)
        table = ModulationTable(self.modulator.layout, max(batch, 64))
        nobody = torch.zeros(0, dtype=torch.int32)
        modulation = self.modulator.bind(table.rows, nobody, dtype=decoder.dtype)
        return Engine(decoder, frozenset(), modulation, table, **limits)

    def person(self, number: int) -> UserWeights:
        if number not in self._people:
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                row = self.modulator.rows(torch.randn(1, LATENT_DIM, generator=generator))[0]
            self._people[number] = UserWeights.of_row(row)
        return self._people[number]

    def request(self, side: str, index: int, arrival: Arrival, *, distinct: bool) -> Request:
        user = None
        if side == "one user":
            user = self.person(0)
        elif side != "base only":
            user = self.person(index if distinct else arrival.user)
        generator = torch.Generator().manual_seed(arrival.conversation)
        vocab = self.model.decoder.config.vocab_size
        prompt = torch.randint(vocab, (arrival.prompt_tokens,), generator=generator).tolist()
        return Request(prompt, user, SamplingParams(max_tokens=arrival.output_tokens))


def serve(
    engine: Engine, requests: Sequence[Request], times: Sequence[float], ttft: float, itl: float
) -> Served:
    """Serve requests that arrive at ``times``, seconds from the start, until all are answered."""
    came: dict[int, float] = {}
    last: dict[int, float] = {}
    slow: set[int] = set()
    first, between = Sketch(), Sketch()
    num_tokens = next_one = 0
    start = time.perf_counter()
    while next_one < len(requests) or len(engine):
        now = time.perf_counter() - start
        while next_one < len(requests) and times[next_one] <= now:
            came[engine.add(requests[next_one])] = times[next_one]
            next_one += 1
        if not len(engine):
            time.sleep(max(0.0, times[next_one] - now))
            continue
        events = engine.step()
        now = time.perf_counter() - start
        for event in events:
            num_tokens += 1
            number = event.request
            if number in last:
                between.add(now - last[number])
                late = now - last[number] > itl
            else:
                first.add(now - came[number])
                late = now - came[number] > ttft
            if late:
                slow.add(number)
            last[number] = now
    seconds = time.perf_counter() - start
    return Served(seconds, num_tokens, first, between, len(requests) - len(slow))


def closed(server: Server, arrivals: Sequence[Arrival], side: str) -> Served:
    """All requests at once, every one a user's own on the sides that have users."""
    engine = server.engine(side, prefix_cache=False)
    requests = [server.request(side, i, a, distinct=True) for i, a in enumerate(arrivals)]
    return serve(engine, requests, [0.0] * len(requests), *_objectives(server.options))


def opened(server: Server, arrivals: Sequence[Arrival], side: str) -> Served:
    """Requests as they come."""
    engine = server.engine(side, prefix_cache=True)
    requests = [server.request(side, i, a, distinct=False) for i, a in enumerate(arrivals)]
    return serve(engine, requests, [a.time for a in arrivals], *_objectives(server.options))


def measure(server: Server, console: Console) -> dict[str, Any]:
    """Every side in turn, round after round; ratios are taken round by round."""
    options = server.options
    trace = _trace(options, rate=1.0)
    arrivals = list(trace.arrivals())
    runs: dict[str, list[Served]] = {side: [] for side in (*SIDES, ALONE)}
    closed(server, arrivals[:4], SIDES[-1])  # the first pass pays for things that are not serving
    for number in range(options.rounds):
        for side in runs if number % 2 == 0 else reversed(runs):
            # One after another takes long: as many as are in flight otherwise are enough.
            few = arrivals[: options.concurrency] if side == ALONE else arrivals
            runs[side].append(closed(server, few, side))
            console.print(
                f"closed, round {number + 1}: {side}: {runs[side][-1].tokens_per_s:.0f} tokens/s"
            )
    result: dict[str, Any] = {
        "closed": {side: [run.summary() for run in served] for side, served in runs.items()},
        "all_distinct_over_base": _ratio(runs, SIDES[-1], SIDES[0]),
        "batched_over_one_at_a_time": _ratio(runs, SIDES[-1], ALONE),
    }
    tokens = statistics.fmean(a.output_tokens for a in arrivals)
    speed = statistics.median(run.tokens_per_s for run in runs[SIDES[-1]])
    result["rate"] = rate = options.load * speed / tokens
    arrivals = list(_trace(options, rate).arrivals())
    result["open"] = {side: [] for side in SIDES}
    for number in range(options.rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            served = opened(server, arrivals, side).summary()
            result["open"][side].append(served)
            console.print(
                f"open, round {number + 1}: {side}: first token {served['ttft_ms_p50']:.0f} ms, "
                f"then {served['itl_ms_p50']:.1f} ms"
            )
    return result


def show(result: dict[str, Any], console: Console) -> None:
    """The medians as tables."""
    table = Table("", "tokens/s", title="closed: all requests waiting")
    for side, runs in result["closed"].items():
        table.add_row(side, f"{_median(runs, 'tokens_per_s'):.0f}")
    console.print(table)
    console.print(
        f"all distinct ÷ base only {result['all_distinct_over_base']:.3f}, "
        f"in a batch ÷ one at a time {result['batched_over_one_at_a_time']:.2f}"
    )
    names = ("ttft_ms_p50", "ttft_ms_p95", "itl_ms_p50", "itl_ms_p95", "goodput_per_s")
    table = Table("", *names, title=f"open: {result['rate']:.2f} requests a second")
    for side, runs in result["open"].items():
        table.add_row(side, *(f"{_median(runs, name):.3g}" for name in names))
    console.print(table)


def _ratio(runs: dict[str, list[Served]], mine: str, theirs: str) -> float:
    pairs = zip(runs[mine], runs[theirs], strict=True)
    return statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in pairs)


def _median(runs: Sequence[dict[str, float]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def _objectives(options: argparse.Namespace) -> tuple[float, float]:
    return options.ttft / 1e3, options.itl / 1e3


def _trace(options: argparse.Namespace, rate: float) -> Trace:
    return Trace(
        rate=rate,
        num_requests=options.requests,
        num_users=options.users,
        prompt=Lengths(options.prompt_tokens, 2 * options.prompt_tokens),
        output=Lengths(options.output_tokens, 2 * options.output_tokens),
        max_prompt=2 * options.prompt_tokens,
        continued=0.0,
        seed=options.seed,
    )


def main(arguments: list[str] | None = None) -> int:
    """The command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--users", type=int, default=1000, help="of the open trace")
    parser.add_argument("--concurrency", type=int, default=32, help="answers in flight")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="mean of a prompt")
    parser.add_argument("--output-tokens", type=int, default=64, help="mean of an answer")
    parser.add_argument("--load", type=float, default=0.6, help="share of the closed throughput")
    parser.add_argument("--ttft", type=float, default=1000.0, help="objective in ms")
    parser.add_argument("--itl", type=float, default=100.0, help="objective in ms")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    options = parser.parse_args(arguments)
    threads = set_threads(options.threads)
    console = Console()
    model = LanguageModel.load(options.model, dtype="bfloat16", show_progress=True)
    result = measure(Server(model, options), console)
    show(result, console)
    if options.json is not None:
        settings = {k: v for k, v in vars(options).items() if k != "json"}
        record = {"machine": {**machine(), "threads": threads}, "settings": settings, **result}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
