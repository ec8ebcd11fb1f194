"""Worker: llama.cpp, the BF16 base model or its F16 copy (``--weights f16``), no adapter.

One ``llama_decode`` call a step carries one token of each of the B sequences, as its server and its
``llama-batched-bench`` do; that tool is not used because it decodes random tokens and picks none.
Only the steps are timed: the prompts of all rows are read, and their first tokens picked, before
the clock starts. A new batch size makes a new context, outside the clock.

Serving batches as llama.cpp's server does, whose loop is not part of the library: a request takes a
free sequence, a step carries the tokens of all that are being written and fills up with prompts,
oldest first, in pieces where they do not fit.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peers import worker
from benchmarks.peers.play import Ask, Played, play
from benchmarks.peers.to_gguf import convert


class LlamaCpp:
    """The model and one context, made anew when a request does not fit the last one."""

    def __init__(
        self, model: Path, work: Path, threads: int, flash_attention: bool, weights: str
    ) -> None:
        import llama_cpp
        from llama_cpp import llama_cpp as api

        self.api, self.threads, self.flash_attention = api, threads, flash_attention
        self.name = "llama_cpp" if weights == "bf16" else f"llama_cpp_{weights}"
        self.version = llama_cpp.__version__
        work.mkdir(parents=True, exist_ok=True)
        path = work / f"{model.name}.{weights}.gguf"
        if not path.exists():
            convert(model, path, weights)
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = api.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.context: Any = None
        self.shape = Shape(0, 0, 0, False)
        self.settings = {
            "threads": threads,
            "weights": weights,
            "flash_attention": flash_attention,
            "serving": "one cache for all sequences",
            "build": api.llama_print_system_info().decode().strip(),
        }

    def decode(self, batch: int, prompt: list[int], new_tokens: int) -> worker.Decoded:
        self._empty(batch, len(prompt) + new_tokens)
        picked = self._read(prompt)
        rows = [picked]
        step = Step(self.api, batch)
        begin = time.perf_counter()
        for position in range(len(prompt), len(prompt) + new_tokens):
            step.tokens[:] = picked
            step.positions[:] = position
            self._run(step)
            picked = self._pick(batch)
            rows.append(picked)
        seconds = time.perf_counter() - begin
        first = np.stack(rows[: worker.NUM_FIRST_TOKENS], axis=1).tolist()
        return worker.Decoded(seconds, batch * new_tokens, first)

    def prefill(self, prompt: list[int]) -> worker.Prefilled:
        self._empty(1, len(prompt))
        begin = time.perf_counter()
        self._read(prompt)
        return worker.Prefilled(time.perf_counter() - begin, len(prompt))

    def serve(self, asked: list[Ask], concurrency: int, step_tokens: int) -> Played:
        longest = max(len(ask.prompt_tokens) + ask.new_tokens for ask in asked)
        # With caches of their own, sequences of different lengths would not share a pass.
        self._have(Shape(concurrency, longest, step_tokens, True))
        waiting: deque[Writing] = deque()
        slots: list[Writing | None] = [None] * concurrency
        step = Step(self.api, step_tokens)

        def add(index: int) -> None:
            ask = asked[index]
            waiting.append(Writing(index, ask.prompt_tokens, ask.new_tokens))

        def run() -> list[tuple[int, int]]:
            for sequence in range(concurrency):
                if slots[sequence] is None and waiting:
                    slots[sequence] = waiting.popleft()
            rows = _fill(step, slots, step_tokens)
            self._run(step)
            if not rows:  # a piece of a long prompt
                return []
            made = []
            for sequence, token in zip(rows, self._pick(len(rows)).tolist(), strict=True):
                one = slots[sequence]
                assert one is not None
                made.append((one.index, token))
                one.pending, one.left = [token], one.left - 1
                if not one.left:
                    memory = self.api.llama_get_memory(self.context)
                    self.api.llama_memory_seq_rm(memory, sequence, -1, -1)
                    slots[sequence] = None
            return made

        return play(asked, add, run)

    def _read(self, prompt: list[int]) -> Any:
        """Read the prompt into every sequence of the context; the token each continues with."""
        batch, length = self.shape.sequences, len(prompt)
        step = Step(self.api, batch * length)
        step.tokens[:] = np.tile(np.asarray(prompt, np.int32), batch)
        step.positions[:] = np.tile(np.arange(length, dtype=np.int32), batch)
        step.sequences[:] = np.repeat(np.arange(batch, dtype=np.int32), length)
        step.wanted[:] = 0
        step.wanted[length - 1 :: length] = 1
        self._run(step)
        return self._pick(batch)

    def _run(self, step: Step) -> None:
        status = self.api.llama_decode(self.context, step.batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")

    def _pick(self, rows: int) -> Any:
        """The greedy token of each row, an int32 array."""
        address = ctypes.cast(self.api.llama_get_logits(self.context), ctypes.c_void_p).value
        memory = (ctypes.c_float * (rows * self.vocab_size)).from_address(address)
        logits = np.frombuffer(memory, np.float32).reshape(rows, self.vocab_size)
        return logits.argmax(axis=1).astype(np.int32)

    def _empty(self, batch: int, length: int) -> None:
        """Have a context of ``batch`` empty sequences of ``length`` tokens each."""
        # Sequences that share nothing are quicker apart.
        self._have(Shape(batch, length, max(2048, batch * length), False))

    def _have(self, shape: Shape) -> None:
        """Have an empty context of this shape, or of longer sequences."""
        api = self.api
        if not self.shape.holds(shape):
            if self.context is not None:
                api.llama_free(self.context)
            capacity = -(-shape.length // 256) * 256
            parameters = api.llama_context_default_params()
            parameters.n_ctx = shape.sequences * capacity
            parameters.n_batch = -(-shape.step_tokens // 256) * 256
            parameters.n_ubatch = 512
            parameters.n_seq_max = shape.sequences
            parameters.n_threads = parameters.n_threads_batch = self.threads
            parameters.kv_unified = shape.unified
            parameters.no_perf = True
            parameters.flash_attn_type = (
                api.LLAMA_FLASH_ATTN_TYPE_ENABLED
                if self.flash_attention
                else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
            )
            self.context = api.llama_init_from_model(self.model, parameters)
            self.shape = shape._replace(length=capacity, step_tokens=parameters.n_batch)
            if not self.context:
                self.context, self.shape = None, Shape(0, 0, 0, False)
                raise RuntimeError(f"no context for {shape}")
        api.llama_memory_clear(api.llama_get_memory(self.context), True)


class Shape(NamedTuple):
    """Of a context: sequences, tokens of each, tokens of a step; whether they share one cache."""

    sequences: int
    length: int
    step_tokens: int
    unified: bool

    def holds(self, other: Shape) -> bool:
        return (
            (self.sequences, self.unified) == (other.sequences, other.unified)
            and self.length >= other.length
            and self.step_tokens >= other.step_tokens
        )


@dataclass
class Writing:
    """Request ``index`` in a sequence: tokens to compute next, tokens to write, tokens computed."""

    index: int
    pending: list[int]
    left: int
    computed: int = 0


def _fill(step: Step, slots: list[Writing | None], room: int) -> list[int]:
    """Put what comes next into a step of at most ``room`` tokens; the sequences that get a token.

    Tokens of answers go before prompts, and older prompts before newer ones.
    """
    order = [(len(one.pending) > 1, one.index, i) for i, one in enumerate(slots) if one is not None]
    rows, used = [], 0
    for _, _, sequence in sorted(order):
        one = slots[sequence]
        assert one is not None
        piece = one.pending[: room - used]
        if not piece:
            break
        here = slice(used, used + len(piece))
        step.tokens[here] = piece
        step.positions[here] = range(one.computed, one.computed + len(piece))
        step.sequences[here] = sequence
        step.wanted[here] = 0
        used += len(piece)
        one.computed += len(piece)
        one.pending = one.pending[len(piece) :]
        if not one.pending:
            step.wanted[used - 1] = 1
            rows.append(sequence)
    step.batch.n_tokens = used
    return rows


class Step:
    """A ``llama_batch`` over arrays of ours: token i goes to ``sequences[i]``, by default its own.

    tokens, positions, sequences: int32 ``[T]``. wanted: int8 ``[T]``, 1 where logits are wanted.
    """

    def __init__(self, api: Any, size: int) -> None:
        self.tokens = np.zeros(size, np.int32)
        self.positions = np.zeros(size, np.int32)
        self.sequences = np.arange(size, dtype=np.int32)
        self.wanted = np.ones(size, np.int8)
        self._counts = np.ones(size, np.int32)
        pointer = ctypes.POINTER(ctypes.c_int32)
        first, width = self.sequences.ctypes.data, self.sequences.itemsize
        self._rows = (pointer * size)(
            *(ctypes.cast(first + i * width, pointer) for i in range(size))
        )
        self.batch = api.llama_batch(
            n_tokens=size,
            token=self.tokens.ctypes.data_as(pointer),
            embd=None,
            pos=self.positions.ctypes.data_as(pointer),
            n_seq_id=self._counts.ctypes.data_as(pointer),
            seq_id=ctypes.cast(self._rows, ctypes.POINTER(pointer)),
            logits=self.wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )


def main() -> int:
    parser = worker.parser(__doc__)
    parser.add_argument("--flash-attention", choices=("on", "off"), default="on")
    parser.add_argument("--weights", choices=("bf16", "f16"), default="bf16")
    options = parser.parse_args()
    return worker.serve(
        lambda: LlamaCpp(
            options.model,
            options.work,
            options.threads,
            options.flash_attention == "on",
            options.weights,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
