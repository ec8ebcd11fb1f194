"""Serving a trace of requests on this machine: base only, one user, every request another user.

    python -m benchmarks.serving --peers llama.cpp,vllm,vllm_lora,peft --json FILE

Two questions. **How much** (closed): all requests wait from the start, 32 answers are in flight,
and tokens a second count; beside it some of them one after another. **How long** (open): requests
arrive in a Poisson process or in bursts of one, users drawn by Zipf's law, and the time to the
first token, the time between tokens and the goodput count (requests a second whose tokens came
within the objectives). Arrivals come at a share of what our engine with every request another user
was just measured to hold, and, beside peers, at that share of what the slowest side holds, so that
nobody is measured in a jam alone.

Peers serve the same requests by continuous batching, each in a process of its own
(`benchmarks.peers.worker`), and one loop plays a trace to all (`benchmarks.peers.play`). Sides are
measured in turn, round after round, in alternating order; ratios are taken round by round. Every
load's first round stands behind `benchmarks.text_gate`. The prefix cache is on where users come
back, for us; the prompts of a trace share nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cpu_command import machine
from benchmarks.peers.client import FOLDER, start
from benchmarks.peers.play import Ask, Played
from benchmarks.serving_sides import ALONE, PEERS, SIDES, Ours, Side, peer_side
from benchmarks.text_gate import Gate
from benchmarks.worker_process import WorkerError
from fssa_runtime.files import write_atomically
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.models.pull import DEFAULT_MODEL
from fssa_runtime.planning.sketch import Sketch
from fssa_runtime.planning.trace import Arrival, Lengths, Trace
from fssa_runtime.threads import set_threads

# Bursts: this many requests on average, at this many times the average rate.
BURST, CROWDING = 8, 4


@dataclasses.dataclass
class Served:
    """What one run of a trace gave, from the times of its tokens. ``good``: requests in time."""

    seconds: float
    num_requests: int
    num_tokens: int
    first_token: Sketch
    between_tokens: Sketch
    good: int

    @classmethod
    def of(cls, asked: Sequence[Ask], played: Played, ttft: float, itl: float) -> Served:
        """ttft, itl: objectives in seconds, from arrival to first token and between two."""
        first, between = Sketch(), Sketch()
        good = 0
        for ask, times in zip(asked, played.times, strict=True):
            waited = times[0] - ask.time
            gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
            first.add(waited)
            for gap in gaps:
                between.add(gap)
            good += waited <= ttft and all(gap <= itl for gap in gaps)
        num_tokens = sum(map(len, played.times))
        return cls(played.seconds, len(asked), num_tokens, first, between, good)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    def summary(self) -> dict[str, float]:
        return {
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
            "goodput_per_s": self.good / self.seconds,
            "good_share": self.good / self.num_requests,
            **{
                f"{name}_ms_p{round(100 * share)}": 1e3 * sketch.quantile(share)
                for name, sketch in (("ttft", self.first_token), ("itl", self.between_tokens))
                if sketch.count
                for share in (0.5, 0.95, 0.99)
            },
        }


def asks(arrivals: Sequence[Arrival], vocab_size: int, *, waiting: bool = False) -> list[Ask]:
    """Arrivals as requests with random prompts; ``waiting``: all at once, each another user's."""
    result = []
    for index, arrival in enumerate(arrivals):
        generator = torch.Generator().manual_seed(arrival.conversation)
        prompt = torch.randint(vocab_size, (arrival.prompt_tokens,), generator=generator).tolist()
        time, user = (0.0, index) if waiting else (arrival.time, arrival.user)
        result.append(Ask(time, user, prompt, arrival.output_tokens))
    return result


class Benchmark:
    """Sides, the gate before them, and the traces that they are given."""

    def __init__(
        self,
        sides: dict[str, Side],
        gate: Gate,
        vocab_size: int,
        options: argparse.Namespace,
        console: Console,
    ) -> None:
        self.sides, self.gate, self.vocab_size = sides, gate, vocab_size
        self.options, self.console = options, console
        self.absent: dict[str, str] = {}

    def measure(self) -> Iterator[dict[str, Any]]:
        """All that is measured so far: after everything waiting, then after every load."""
        arrivals = self._arrivals("poisson", 1.0)
        waiting = asks(arrivals, self.vocab_size, waiting=True)
        self._warm(waiting)
        # One after another takes long: as many as are in flight otherwise are enough.
        few = {ALONE: waiting[: self.options.concurrency]}
        runs, losses = self._rounds("closed", {name: few.get(name, waiting) for name in self.sides})
        result: dict[str, Any] = {
            "closed": {name: _summaries(served) for name, served in runs.items()},
            "closed_losses": losses,
            "all_distinct_over": {
                name: _ratio(runs, SIDES[-1], name) for name in runs if name != SIDES[-1]
            },
            "open": [],
        }
        yield result
        speeds = {
            name: statistics.median(run.tokens_per_s for run in served)
            for name, served in runs.items()
            if name != ALONE
        }
        tokens = statistics.fmean(ask.new_tokens for ask in waiting)
        for kind, of in _loads(self.options.arrivals, speeds):
            rate = self.options.load * speeds[of] / tokens
            result["open"].append({"arrivals": kind, "share_of": of, **self._open(kind, rate)})
            yield result

    def _open(self, kind: str, rate: float) -> dict[str, Any]:
        """All sides under one load."""
        arrivals = self._arrivals(kind, rate)
        # A slow load ends early, but not before it has shown something.
        enough = [a for a in arrivals if a.time <= self.options.seconds]
        asked = asks(arrivals[: max(len(enough), 8)], self.vocab_size)
        where = f"open, {kind}, {rate:.2f}/s"
        runs, losses = self._rounds(where, {n: asked for n in self.sides if n != ALONE})
        return {
            "rate": rate,
            "num_requests": len(asked),
            "num_users": len({ask.user for ask in asked}),
            "losses": losses,
            "sides": {name: _summaries(served) for name, served in runs.items()},
        }

    def _warm(self, waiting: Sequence[Ask]) -> None:
        """A short pass of every side pays for what is not serving; a peer that fails is absent."""
        short = [
            ask._replace(new_tokens=min(ask.new_tokens, 16))
            for ask in waiting[: self.options.concurrency]
        ]
        for name in list(self.sides):
            asked = short[:4] if name == ALONE else short
            self.console.print(f"first pass: {name}")
            try:
                self._judge(name, asked, self.sides[name].play(asked, False))
            except (WorkerError, RuntimeError) as error:
                if name in (*SIDES, ALONE):
                    raise
                self.absent[name] = str(error)
                del self.sides[name]

    def _rounds(
        self, where: str, asked: Mapping[str, Sequence[Ask]]
    ) -> tuple[dict[str, list[Served]], dict[str, dict[str, float]]]:
        """Sides in turn, there and back; the first round is judged."""
        runs: dict[str, list[Served]] = {name: [] for name in asked}
        losses: dict[str, dict[str, float]] = {}
        for number in range(self.options.rounds):
            for name in runs if number % 2 == 0 else reversed(runs):
                played = self.sides[name].play(asked[name], where != "closed")
                served = Served.of(asked[name], played, *_objectives(self.options))
                runs[name].append(served)
                self.console.print(
                    f"{where}, round {number + 1}: {name}: {served.tokens_per_s:.0f} tokens/s, "
                    f"first token {1e3 * served.first_token.quantile(0.5):.0f} ms"
                )
                if number == 0:
                    losses[name] = self._judge(name, asked[name], played)
        return runs, losses

    def _judge(self, name: str, asked: Sequence[Ask], played: Played) -> dict[str, float]:
        wear = self.sides[name].wear
        try:
            return self.gate.judge(
                [ask.prompt_tokens for ask in asked],
                played.first_tokens,
                None if wear is None else wear(asked),
            )
        except RuntimeError as error:
            raise RuntimeError(f"gate: {name}: {error}") from error

    def _arrivals(self, kind: str, rate: float) -> list[Arrival]:
        return list(trace_of(self.options, kind, rate).arrivals())


def show(result: dict[str, Any], absent: dict[str, str], console: Console) -> None:
    """The medians as tables."""
    table = Table("", "tokens/s", "all distinct ÷ this", title="closed: all requests waiting")
    for name, runs in result["closed"].items():
        ratio = result["all_distinct_over"].get(name)
        shown = "" if ratio is None else f"{ratio:.3f}"
        table.add_row(name, f"{_median(runs, 'tokens_per_s'):.0f}", shown)
    console.print(table)
    names = ("ttft_ms_p50", "ttft_ms_p95", "itl_ms_p50", "itl_ms_p95", "goodput_per_s")
    for load in result["open"]:
        title = (
            f"open, {load['arrivals']}: {load['rate']:.2f} requests a second, "
            f"a share of what {load['share_of']} holds"
        )
        table = Table("", *names, "good", title=title)
        for name, runs in load["sides"].items():
            cells = [f"{_median(runs, column):.3g}" for column in names]
            table.add_row(name, *cells, f"{_median(runs, 'good_share'):.0%}")
        console.print(table)
    for name, reason in absent.items():
        console.print(f"{name}: not measured ({reason})")


def _summaries(served: Sequence[Served]) -> list[dict[str, float]]:
    return [run.summary() for run in served]


def _ratio(runs: dict[str, list[Served]], mine: str, theirs: str) -> float:
    pairs = zip(runs[mine], runs[theirs], strict=True)
    return statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in pairs)


def _median(runs: Sequence[dict[str, float]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def _loads(kinds: Sequence[str], speeds: Mapping[str, float]) -> list[tuple[str, str]]:
    """Arrivals, and the side of whose throughput they are a share."""
    loads = [(kind, SIDES[-1]) for kind in kinds]
    slowest = min(speeds, key=speeds.__getitem__)
    if slowest not in SIDES:
        loads.append((kinds[0], slowest))
    return loads


def _objectives(options: argparse.Namespace) -> tuple[float, float]:
    return options.ttft / 1e3, options.itl / 1e3


def trace_of(options: argparse.Namespace, kind: str, rate: float) -> Trace:
    """The requests of a run with these options; their lengths do not depend on kind and rate."""
    on = BURST / (CROWDING * rate)
    return Trace(
        rate=rate,
        on_seconds=on,
        off_seconds=(CROWDING - 1) * on if kind == "bursty" else 0.0,
        num_requests=options.requests,
        num_users=options.users,
        prompt=Lengths(options.prompt_tokens, 2 * options.prompt_tokens),
        output=Lengths(options.output_tokens, 2 * options.output_tokens),
        max_prompt=2 * options.prompt_tokens,
        continued=0.0,
        seed=options.seed,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument(
        "--peers",
        default=",".join(PEERS),
        help=f"comma-separated, of {', '.join(PEERS)}; empty for none",
    )
    parser.add_argument("--peers-folder", type=Path, default=FOLDER, help="of setup.sh")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--users", type=int, default=1000, help="of the open trace")
    parser.add_argument("--concurrency", type=int, default=32, help="answers in flight")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="mean of a prompt")
    parser.add_argument("--output-tokens", type=int, default=64, help="mean of an answer")
    parser.add_argument(
        "--arrivals", default="poisson,bursty", help="comma-separated, of poisson, bursty"
    )
    parser.add_argument("--load", type=float, default=0.6, help="share of the closed throughput")
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals of a load at most")
    parser.add_argument("--ttft", type=float, default=1000.0, help="objective in ms")
    parser.add_argument("--itl", type=float, default=100.0, help="objective in ms")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    options = parser.parse_args(arguments)
    for name, known in (("peers", tuple(PEERS)), ("arrivals", ("poisson", "bursty"))):
        chosen = list(dict.fromkeys(word for word in getattr(options, name).split(",") if word))
        if not set(chosen) <= set(known):
            parser.error(f"--{name}: expected some of {', '.join(known)}, got {', '.join(chosen)}")
        setattr(options, name, chosen)
    if not options.arrivals:
        parser.error("--arrivals: expected at least one")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 where a gate fails."""
    options = parse(arguments)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    threads = set_threads(options.threads)
    console = Console()
    model = LanguageModel.load(options.model, dtype="bfloat16", show_progress=True)
    gate = Gate(model.folder)
    ours = Ours(model, options)
    slot_costs = ours.slot_costs()
    console.print(
        f"a user's row: found in {slot_costs['find_ms']:.3f} ms, filled in "
        f"{slot_costs['fill_ms']:.3f} ms"
    )
    sides = {name: ours.side(name) for name in (*SIDES, ALONE)}
    with ExitStack() as stack:
        peers, absent = start(
            [PEERS[chosen] for chosen in options.peers],
            stack,
            model=model.folder,
            folder=options.peers_folder,
            threads=threads,
            timeout=3600.0,
            serving=True,
            report=console.print,
        )
        for name, peer in peers.items():
            sides[name] = peer_side(peer, model.folder, options.concurrency)
        bench = Benchmark(sides, gate, model.decoder.config.vocab_size, options, console)
        settings = {k: v for k, v in vars(options).items() if k not in ("json", "peers_folder")}
        result: dict[str, Any] = {}
        status = 0
        try:
            for result in bench.measure():
                record = {
                    "machine": {**machine(), "threads": threads},
                    "settings": settings,
                    "peers": {
                        name: {"version": peer.version, "settings": peer.settings}
                        for name, peer in peers.items()
                        if name not in absent | bench.absent
                    },
                    "absent": absent | bench.absent,
                    "slots": slot_costs,
                    **result,
                }
                if options.json is not None:
                    write_atomically(options.json, f"{json.dumps(record, indent=1)}\n".encode())
        except (KeyboardInterrupt, RuntimeError) as error:
            status = 130 if isinstance(error, KeyboardInterrupt) else 1
            console.print(f"ended early: {error}" if str(error) else "ended early")
    if result:
        show(result, absent | bench.absent, console)
    return status


if __name__ == "__main__":
    sys.exit(main())
