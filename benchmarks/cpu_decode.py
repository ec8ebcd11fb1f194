"""Decoding on a CPU, base only and modulated, beside engines that have no per-user weights.

    python -m benchmarks.cpu_decode --peers llama.cpp,vllm,hf,peft --batch 1,8,32 --json FILE

All sides run the same model files and are measured in turn, round after round, so that what else
the machine does falls on all of them. What a peer's timing covers is said in
`benchmarks.peers.worker`; ours covers the same through `Engine.generate`, scheduling and the choice
of tokens included. Three rows are ours: no modulation, one user, and every row another user
(gated, rank 16, all seven linears).

Speed counts only behind gates. Ours are in `benchmarks.decode_sides.check_ours`. A first round that
does not count has every peer's tokens judged at every batch size by `benchmarks.text_gate`, its
adapters merged by hand; a peer that fails is absent with that reason, as is one that cannot start.

A round takes every batch size and the prefill once, and the file is written anew after every round:
whoever ends the run early (Ctrl-C) has the rounds there were, and the file says how many. A peer
that fails later ends the run as well.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import cpu_command
from benchmarks.decode_sides import OURS, Limits, Ours, check_ours
from benchmarks.modulated import RANK
from benchmarks.peers.client import FOLDER, Peer, start
from benchmarks.text_gate import Gate, wear_adapters
from benchmarks.worker_process import WorkerError
from fssa_runtime.files import write_atomically
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.threads import set_threads

PEERS = {
    # As F16 too: where an instruction set has no products of bf16, that is the faster of its two.
    "llama.cpp": ("llama_cpp", "llama_cpp_f16"),
    "vllm": ("vllm", "vllm_lora"),
    "hf": ("hf",),
    "peft": ("peft",),
}
PROMPT = "Tell me about the weather in the mountains, and what to wear there."
# How often each of our sides is measured before the peers of a round, and after them.
_TIMES_EACH = 3


def first_round(
    ours: Ours,
    peers: dict[str, Peer],
    batches: Sequence[int],
    gate: Gate,
    *,
    prompt: list[int],
    long_prompt: list[int],
    new: int,
    console: Console,
) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, str]]:
    """All sides once, uncounted: what peers' tokens lose at each batch size, and who fails.

    Peers that fail are ended and taken out of ``peers``; the second result says why.
    """
    for row in OURS:
        for batch in batches:
            ours.decode(row, batch, prompt=prompt, new=new)
        ours.prefill(row, long_prompt)
    losses: dict[str, dict[str, dict[str, float]]] = {}
    failed: dict[str, str] = {}
    for name, peer in list(peers.items()):
        try:
            losses[name] = {
                str(batch): _judge(peer, batch, gate, ours.model.folder, prompt, new)
                for batch in batches
            }
            peer.prefill(long_prompt)
            console.print(f"gate: {name} passes: {losses[name]}")
        except RuntimeError as error:
            failed[name] = str(error)
            console.print(f"{name} is left out: {error}")
            peers.pop(name).close()
            losses.pop(name, None)
    return losses, failed


def _judge(
    peer: Peer, batch: int, gate: Gate, folder: Path, prompt: list[int], new: int
) -> dict[str, float]:
    answers = peer.decode(batch, prompt, new).first_tokens
    if len(answers) != batch or not all(answers):
        raise RuntimeError(f"gate: batch {batch}: tokens for {sum(map(bool, answers))} rows")
    wear = wear_adapters(range(batch), folder, peer.work) if peer.adapters else None
    try:
        return gate.judge([prompt] * batch, answers, wear)
    except RuntimeError as error:
        raise RuntimeError(f"gate: batch {batch}: {error}") from error


def measure(
    ours: Ours,
    peers: dict[str, Peer],
    batches: Sequence[int],
    *,
    prompt: list[int],
    long_prompt: list[int],
    new: int,
    rounds: int,
    console: Console,
) -> Iterator[dict[str, Any]]:
    """All samples so far, after every round."""
    decoders: dict[str, Callable[[int], float]] = {
        row: functools.partial(ours.decode, row, prompt=prompt, new=new) for row in OURS
    }
    prefills: dict[str, Callable[[], float]] = {
        row: functools.partial(ours.prefill, row, long_prompt) for row in OURS
    }
    for name, peer in peers.items():
        decoders[name] = lambda batch, peer=peer: _rate(peer.decode(batch, prompt, new))
        prefills[name] = lambda peer=peer: _rate(peer.prefill(long_prompt))
    limits = Limits()
    raw: dict[str, Any] = {
        "decode": {str(batch): {name: [] for name in decoders} for batch in batches},
        "prefill": {name: [] for name in prefills},
        "limits": {
            str(batch): {"stream_bytes_per_s": [], "product_flop_per_s": [], "barrier_s": []}
            for batch in batches
        },
    }
    for number in range(1, rounds + 1):
        where = f"round {number} of {rounds}"
        for batch in batches:
            sides = {name: functools.partial(side, batch) for name, side in decoders.items()}
            rates = _round(sides)
            _report(console, f"{where}, batch {batch}", rates)
            _append(raw["decode"][str(batch)], rates)
            _append(
                raw["limits"][str(batch)],
                {
                    "stream_bytes_per_s": limits.stream(),
                    "product_flop_per_s": limits.product(),
                    "barrier_s": limits.barrier(),
                },
            )
        rates = _round(prefills)
        _report(console, f"{where}, prefill", rates)
        _append(raw["prefill"], rates)
        yield raw


def _append(samples: dict[str, list[float]], values: dict[str, float]) -> None:
    for name, value in values.items():
        samples[name].append(value)


def _round(sides: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Every side once. Ours, which are quick, are measured before the others and, in reverse, after
    them, several times each: drift spares nobody, and a moment's disturbance does not count."""
    ours: dict[str, list[float]] = {name: [] for name in OURS}
    for _ in range(_TIMES_EACH):
        for name in OURS:
            ours[name].append(sides[name]())
    rates = {name: side() for name, side in sides.items() if name not in ours}
    for _ in range(_TIMES_EACH):
        for name in reversed(OURS):
            ours[name].append(sides[name]())
    return {**{name: statistics.median(values) for name, values in ours.items()}, **rates}


def _report(console: Console, where: str, rates: dict[str, float]) -> None:
    console.print(f"{where}: " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()))


def _rate(timing: Any) -> float:
    return timing.tokens / timing.seconds


def summarise(raw: dict[str, Any], ours: Ours, context: int) -> dict[str, Any]:
    """Medians, and ratios of samples of the same round."""
    summary: dict[str, Any] = {"weight_bytes": ours.weight_bytes(), "decode": {}, "prefill": {}}
    for batch, samples in raw["decode"].items():
        rows = {name: {"tokens_per_s": statistics.median(v)} for name, v in samples.items()}
        for name in rows:
            rows[name]["all_distinct_over_this"] = _ratio(samples["all distinct"], samples[name])
        for name in OURS:
            limits = raw["limits"][batch]
            step_bytes = ours.step_bytes(name, int(batch), context)
            rows[name]["fraction_of_stream"] = step_bytes * _ratio(
                [rate / int(batch) for rate in samples[name]], limits["stream_bytes_per_s"]
            )
            rows[name]["fraction_of_product"] = ours.token_flop(name, context) * _ratio(
                samples[name], limits["product_flop_per_s"]
            )
        summary["decode"][batch] = rows
    for name, values in raw["prefill"].items():
        summary["prefill"][name] = {
            "tokens_per_s": statistics.median(values),
            "all_distinct_over_this": _ratio(raw["prefill"]["all distinct"], values),
        }
    return summary


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def show(summary: dict[str, Any], absent: dict[str, str], console: Console) -> None:
    """The summary as tables."""
    for batch, rows in [*summary["decode"].items(), ("prefill", summary["prefill"])]:
        title = "prefill" if batch == "prefill" else f"decode, batch {batch}"
        table = Table(title=title, title_justify="left")
        for column in ("", "tokens/s", "all distinct ÷ this", "of the stream", "of the product"):
            table.add_column(column, justify="left" if not column else "right")
        for name, row in rows.items():
            shares = [row.get(f"fraction_of_{limit}") for limit in ("stream", "product")]
            table.add_row(
                name,
                f"{row['tokens_per_s']:.1f}",
                f"{row['all_distinct_over_this']:.3f}",
                *("" if share is None else f"{share:.2f}" for share in shares),
            )
        console.print(table)
    for name, reason in absent.items():
        console.print(f"{name}: not measured ({reason})")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cpu_command.parser("cpu_decode", __doc__, written="after every round")
    parser.add_argument(
        "--peers",
        default="llama.cpp,vllm,hf,peft",
        help=f"comma-separated, of {', '.join(PEERS)}; empty for none",
    )
    parser.add_argument("--peers-folder", type=Path, default=FOLDER, help="of setup.sh")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    options.peers = [name for name in options.peers.split(",") if name]
    unknown = sorted(set(options.peers) - set(PEERS))
    if unknown:
        parser.error(f"--peers: expected some of {', '.join(PEERS)}, got {', '.join(unknown)}")
    if min(options.new_tokens, options.prefill_tokens, options.rounds) < 1:
        parser.error("tokens and rounds must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 where a gate of ours fails, or a peer that had passed its own."""
    options = parse(arguments)
    console = Console()
    if not cpu_command.kernels_are_built(console):
        return 1
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    set_threads(options.threads)
    model = LanguageModel.load(options.model, dtype="bfloat16", show_progress=True)
    prompt = model.chat_tokens(PROMPT)
    long_prompt = (prompt * (options.prefill_tokens // len(prompt) + 1))[: options.prefill_tokens]
    row_tokens = max(256, len(prompt) + options.new_tokens)
    ours = Ours(model, max(options.batch), options.prefill_tokens, row_tokens)
    gate = Gate(model.folder)
    try:
        passed = check_ours(ours, gate, prompt, max(options.batch))
    except RuntimeError as error:
        console.print(str(error))
        return 1
    texts = {"prompt": prompt, "long_prompt": long_prompt, "new": options.new_tokens}
    status = 0
    with ExitStack() as stack:
        peers, absent = start(
            [name for peer in options.peers for name in PEERS[peer]],
            stack,
            model=model.folder,
            folder=options.peers_folder,
            threads=torch.get_num_threads(),
            report=console.print,
        )
        losses, failed = first_round(ours, peers, options.batch, gate, console=console, **texts)
        absent |= failed
        del gate  # its two models are wanted no more
        result: dict[str, Any] = {
            "machine": cpu_command.machine(),
            "model": options.model,
            "rank": RANK,
            "prompt_tokens": len(prompt),
            "new_tokens": options.new_tokens,
            "prefill_tokens": options.prefill_tokens,
            "gates": {**passed, "peers_mean_loss": losses},
            "peers": {n: {"version": p.version, "settings": p.settings} for n, p in peers.items()},
            "absent": absent,
        }
        try:
            for raw in measure(
                ours,
                peers,
                options.batch,
                rounds=options.rounds,
                console=console,
                **texts,
            ):
                result["rounds"] = len(raw["prefill"][OURS[0]])
                result["summary"] = summarise(raw, ours, len(prompt) + options.new_tokens // 2)
                result["raw"] = raw
                if options.json is not None:
                    write_atomically(options.json, f"{json.dumps(result, indent=2)}\n".encode())
        except (KeyboardInterrupt, WorkerError) as error:
            status = 130 if isinstance(error, KeyboardInterrupt) else 1
            done = f"ended after round {result.get('rounds', 0)} of {options.rounds}"
            console.print(f"{done}: {error}" if str(error) else done)
    if "summary" in result:
        show(result["summary"], absent, console)
    return status


if __name__ == "__main__":
    sys.exit(main())
