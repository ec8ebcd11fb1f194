"""Decoding on a CPU, base only and modulated, beside engines that have no per-user weights.

    python -m benchmarks.cpu_decode --peers llama.cpp,vllm,hf,peft --batch 1,8,32 --json FILE

All sides run the same model files and are measured in turn, round after round, so that what else
the machine does falls on all of them. What a peer's timing covers is said in
`benchmarks.peers.worker`; ours covers the same through `Engine.generate`, scheduling and the choice
of tokens included. Three rows are ours: no modulation, one user, and every row another user
(gated, rank 16, all seven linears). Speed counts only behind the gates: see `gates`.

A round takes every batch size and the prefill once, and the file is written anew after every round:
whoever ends the run early (Ctrl-C) has the rounds there were, and the file says how many.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.modulated import LATENT_DIM, RANK, random_modulator
from benchmarks.peers.client import FOLDER, Peer, available
from fssa_kernels import PackArena
from fssa_kernels.native import NATIVE
from fssa_runtime.conditioning.merge import merged, reference_answer_logprobs
from fssa_runtime.conditioning.table import ModulationTable
from fssa_runtime.conditioning.user_weights import UserWeights
from fssa_runtime.engine.engine import Engine
from fssa_runtime.files import write_atomically
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.models.pull import DEFAULT_MODEL
from fssa_runtime.request import Completion, Request, SamplingParams
from fssa_runtime.threads import set_threads

OURS = ("base only", "one user", "all distinct")
PEERS = {
    # As F16 too: where an instruction set has no products of bf16, that is the faster of its two.
    "llama.cpp": ("llama_cpp", "llama_cpp_f16"),
    "vllm": ("vllm", "vllm_lora"),
    "hf": ("hf",),
    "peft": ("peft",),
}
PRODUCTS = (torch.bfloat16, torch.float32)
PROMPT = "Tell me about the weather in the mountains, and what to wear there."


class Ours:
    """The three rows that are ours, on one set of packed weights."""

    def __init__(self, model: LanguageModel, max_batch: int, prefill_tokens: int) -> None:
        self.model = model
        self.modulator = random_modulator(model.decoder.config)
        self.table = ModulationTable(self.modulator.layout, max_batch)
        latents = torch.randn(max_batch, LATENT_DIM, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            self.users = [UserWeights.of_row(row) for row in self.modulator.rows(latents)]
        nobody = torch.zeros(0, dtype=torch.int32)
        modulation = self.modulator.bind(self.table.rows, nobody, dtype=model.decoder.dtype)
        limits = {
            "max_batch_size": max_batch,
            "max_batch_tokens": max(2048, prefill_tokens),
            "max_kv_tokens": max(max_batch * 256, 2 * prefill_tokens),
            # The same prompt comes again and again, and is to be computed each time.
            "prefix_cache": False,
        }
        no_stops: frozenset[int] = frozenset()
        self.engines = {
            "base only": Engine(model.decoder, no_stops, **limits),
            "one user": Engine(model.decoder, no_stops, modulation, self.table, **limits),
        }
        self.engines["all distinct"] = self.engines["one user"]
        for name, engine in self.engines.items():
            if engine.runner.eager_reason is not None:
                raise RuntimeError(
                    f"{name}: the step is not replayed: {engine.runner.eager_reason}"
                )

    def requests(self, row: str, batch: int, prompt: list[int], new: int) -> list[Request]:
        users: list[UserWeights | None] = {
            "base only": [None] * batch,
            "one user": [self.users[0]] * batch,
            "all distinct": self.users[:batch],
        }[row]
        sampling = SamplingParams(max_tokens=new)
        return [Request(prompt, user, sampling) for user in users]

    def decode(self, row: str, batch: int, *, prompt: list[int], new: int) -> float:
        """Tokens a second of ``new`` steps, the prefill and its token left out."""
        started = [0.0]

        def on_token(index: int, _token: int) -> None:
            if not started[0] and index == batch - 1:
                started[0] = time.perf_counter()

        requests = self.requests(row, batch, prompt, new + 1)
        self.engines[row].generate(requests, on_token=on_token)
        return batch * new / (time.perf_counter() - started[0])

    def prefill(self, row: str, prompt: list[int]) -> float:
        start = time.perf_counter()
        self.engines[row].generate(self.requests(row, 1, prompt, 1))
        return len(prompt) / (time.perf_counter() - start)

    def step_bytes(self, row: str, batch: int, context: int) -> int:
        """What a decode step must read: packed weights, factors, keys and values."""
        decoder = self.model.decoder
        weights = [decoder.lm_head]
        for layer in decoder.blocks:
            weights += [getattr(layer, name) for name, _, _ in layer.linears()]
        total = sum(weight.num_bytes for weight in weights)
        if row != "base only":
            total += sum(
                2 * p.numel()
                for group in (self.modulator.lora_a, self.modulator.lora_b)
                for p in group.values()
            )
        config = decoder.config
        kv = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim
        return total + batch * context * kv


def gates(ours: Ours, prompt: list[int], batch: int) -> dict[str, Any]:
    """What has to hold before a speed is printed; raises RuntimeError where it does not.

    Every row of a batch of distinct users is, to the bit, what that user gets alone; users differ;
    and the log-probabilities of what a user got are as close to fp32 as plain PyTorch's are at the
    same dtype with the user's weights merged by hand (at most twice its error, plus 0.01 nats).
    """
    together = ours.engines["all distinct"].generate(
        ours.requests("all distinct", batch, prompt, 24)
    )
    alone = [
        ours.engines["all distinct"].generate([request])[0]
        for request in ours.requests("all distinct", batch, prompt, 24)
    ]
    if any(
        a.tokens != b.tokens or a.logprobs != b.logprobs
        for a, b in zip(together, alone, strict=True)
    ):
        raise RuntimeError("gate: a row of the batch differs from the same user alone")
    distinct = len({tuple(c.logprobs) for c in together})
    if distinct != batch:
        raise RuntimeError(f"gate: {batch} users, {distinct} different results")
    errors = _errors(ours, prompt, together[0])
    if errors["ours"] > 2 * errors["plain"] + 0.01:
        raise RuntimeError(f"gate: mean error of log-probabilities {errors}")
    return {"rows_equal_alone": "bitwise", "distinct": distinct, "mean_abs_error": errors}


def _errors(ours: Ours, prompt: list[int], completion: Completion) -> dict[str, float]:
    """Mean |Δ log p| of one user's text from fp32, ours and plain bf16 PyTorch's."""
    from transformers import AutoModelForCausalLM

    scored = {}
    row = ours.users[0].make_row()
    for dtype in (torch.float32, torch.bfloat16):
        reference = AutoModelForCausalLM.from_pretrained(
            ours.model.folder, dtype=dtype, local_files_only=True
        ).eval()
        with merged(reference, ours.modulator, row) as own:
            scored[dtype] = reference_answer_logprobs(own, prompt, completion.tokens)
    exact = scored[torch.float32]
    return {
        "ours": float((torch.tensor(completion.logprobs) - exact).abs().mean()),
        "plain": float((scored[torch.bfloat16] - exact).abs().mean()),
    }


class Limits:
    """What this machine can do at the moment, measured in turn with the sides."""

    def __init__(self) -> None:
        # On the pages that weights lie on.
        self._memory = PackArena().take(256 * 1024 * 1024).fill_(1)
        x, weight = torch.randn(1024, 1536), torch.randn(3072, 1536)
        self._products = [(x.to(dtype), weight.to(dtype)) for dtype in PRODUCTS]

    def stream(self, seconds: float = 0.3) -> float:
        """Bytes a second that all threads read."""
        assert NATIVE is not None
        memory, threads = self._memory, torch.get_num_threads()
        passes = 0
        start = time.perf_counter()
        while time.perf_counter() < start + seconds:
            NATIVE.stream_seconds(memory.data_ptr(), memory.numel(), threads)
            passes += 1
        return passes * memory.numel() / (time.perf_counter() - start)

    def product(self, seconds: float = 0.3) -> float:
        """FLOP a second of PyTorch's matrix product, in bf16 or fp32, whichever is faster."""
        rates = []
        for x, weight in self._products:
            passes = 0
            start = time.perf_counter()
            with torch.inference_mode():
                while time.perf_counter() < start + seconds / len(self._products):
                    torch.nn.functional.linear(x, weight)
                    passes += 1
            flop = 2 * x.shape[0] * weight.numel()
            rates.append(passes * flop / (time.perf_counter() - start))
        return max(rates)


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
    """All samples so far, after every round but the first, which does not count."""
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
            str(batch): {"stream_bytes_per_s": [], "product_flop_per_s": []} for batch in batches
        },
    }
    for number in range(rounds + 1):
        where = f"round {number} of {rounds}"
        for batch in batches:
            sides = {name: functools.partial(side, batch) for name, side in decoders.items()}
            rates = _round(sides)
            _report(console, f"{where}, batch {batch}", rates)
            if number:
                _append(raw["decode"][str(batch)], rates)
                _append(
                    raw["limits"][str(batch)],
                    {
                        "stream_bytes_per_s": limits.stream(),
                        "product_flop_per_s": limits.product(),
                    },
                )
        rates = _round(prefills)
        _report(console, f"{where}, prefill", rates)
        if number:
            _append(raw["prefill"], rates)
            yield raw


def _append(samples: dict[str, list[float]], values: dict[str, float]) -> None:
    for name, value in values.items():
        samples[name].append(value)


def _round(sides: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Every side once; ours, which are quick, again in reverse, so that drift spares nobody."""
    rates = {name: [side()] for name, side in sides.items()}
    for name in reversed(OURS):
        rates[name].append(sides[name]())
    return {name: statistics.fmean(values) for name, values in rates.items()}


def _report(console: Console, where: str, rates: dict[str, float]) -> None:
    console.print(f"{where}: " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()))


def _rate(timing: Any) -> float:
    return timing.tokens / timing.seconds


def summarise(raw: dict[str, Any], ours: Ours, context: int) -> dict[str, Any]:
    """Medians, and ratios of samples of the same round."""
    summary: dict[str, Any] = {"decode": {}, "prefill": {}}
    for batch, samples in raw["decode"].items():
        rows = {name: {"tokens_per_s": statistics.median(v)} for name, v in samples.items()}
        for name in rows:
            rows[name]["all_distinct_over_this"] = _ratio(samples["all distinct"], samples[name])
        for name in OURS:
            step_bytes = ours.step_bytes(name, int(batch), context)
            rows[name]["fraction_of_stream"] = step_bytes * _ratio(
                [rate / int(batch) for rate in samples[name]],
                raw["limits"][batch]["stream_bytes_per_s"],
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
        for column in ("", "tokens/s", "all distinct ÷ this", "fraction of stream"):
            table.add_column(column, justify="left" if not column else "right")
        for name, row in rows.items():
            share = row.get("fraction_of_stream")
            table.add_row(
                name,
                f"{row['tokens_per_s']:.1f}",
                f"{row['all_distinct_over_this']:.3f}",
                "" if share is None else f"{share:.2f}",
            )
        console.print(table)
    for name, reason in absent.items():
        console.print(f"{name}: not measured ({reason})")


def machine() -> dict[str, Any]:
    """What a result was measured on, and from which commit."""
    assert NATIVE is not None
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": NATIVE.instruction_set(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--peers",
        default="llama.cpp,vllm,hf,peft",
        help=f"comma-separated, of {', '.join(PEERS)}; empty for none",
    )
    parser.add_argument("--peers-folder", type=Path, default=FOLDER, help="of setup.sh")
    parser.add_argument("--batch", default="1,8,32", help="comma-separated batch sizes")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="default: physical cores")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--json", type=Path, help="where the result goes, after every round")
    options = parser.parse_args(arguments)
    options.peers = [name for name in options.peers.split(",") if name]
    unknown = sorted(set(options.peers) - set(PEERS))
    if unknown:
        parser.error(f"--peers: expected some of {', '.join(PEERS)}, got {', '.join(unknown)}")
    try:
        options.batch = [int(size) for size in options.batch.split(",")]
    except ValueError:
        parser.error(f"--batch: expected numbers, got {options.batch!r}")
    if min([*options.batch, options.new_tokens, options.prefill_tokens, options.rounds]) < 1:
        parser.error("sizes, tokens and rounds must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 where a gate fails."""
    options = parse(arguments)
    console = Console()
    if NATIVE is None:
        console.print("the native kernels are not built: nothing to measure")
        return 1
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    set_threads(options.threads)
    model = LanguageModel.load(options.model, dtype="bfloat16", show_progress=True)
    prompt = model.chat_tokens(PROMPT)
    long_prompt = (prompt * (options.prefill_tokens // len(prompt) + 1))[: options.prefill_tokens]
    ours = Ours(model, max(options.batch), options.prefill_tokens)
    try:
        passed = gates(ours, prompt, max(options.batch))
    except RuntimeError as error:
        console.print(str(error))
        return 1
    wanted = [name for peer in options.peers for name in PEERS[peer]]
    reasons = {name: available(name, folder=options.peers_folder) for name in wanted}
    absent = {name: reason for name, reason in reasons.items() if reason is not None}
    with ExitStack() as stack:
        peers = {}
        for name in wanted:
            if name in absent:
                continue
            console.print(f"starting {name}")
            peers[name] = stack.enter_context(
                Peer(
                    name,
                    model=model.folder,
                    folder=options.peers_folder,
                    threads=torch.get_num_threads(),
                )
            )
        result = {
            "machine": machine(),
            "model": options.model,
            "rank": RANK,
            "prompt_tokens": len(prompt),
            "new_tokens": options.new_tokens,
            "prefill_tokens": options.prefill_tokens,
            "gates": passed,
            "peers": {n: {"version": p.version, "settings": p.settings} for n, p in peers.items()},
            "absent": absent,
        }
        try:
            for raw in measure(
                ours,
                peers,
                options.batch,
                prompt=prompt,
                long_prompt=long_prompt,
                new=options.new_tokens,
                rounds=options.rounds,
                console=console,
            ):
                result["rounds"] = len(raw["prefill"][OURS[0]])
                result["summary"] = summarise(raw, ours, len(prompt) + options.new_tokens // 2)
                result["raw"] = raw
                if options.json is not None:
                    write_atomically(options.json, f"{json.dumps(result, indent=2)}\n".encode())
        except KeyboardInterrupt:
            console.print(f"ended after round {result.get('rounds', 0)} of {options.rounds}")
    if "summary" not in result:
        return 130
    show(result["summary"], absent, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
