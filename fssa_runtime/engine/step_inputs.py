"""The static buffers that a step reads, and how a batch is written into them.

Their addresses never change, so a step can be recorded once. For a GPU they lie in one block of
memory: a batch is written on the host, into pinned memory, and goes over in one copy.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from ..request import SamplingParams
from .edits import Edits

_PER_TOKEN = ("tokens", "positions", "slots", "kv_slots")
_PER_SEQUENCE = {
    "kv_lens": torch.int32,
    "last": torch.int32,
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "uniform": torch.float32,
    "forced": torch.int32,
    "num_done": torch.int32,
    "ended": torch.int32,
}
# Stop tokens of a row that the step after can follow without a look at it, at most.
MAX_STOP_TOKENS = 16
# Those that say how a token is chosen: the arguments of `fssa_kernels.sample`, in its order.
DRAWS = ("temperature", "top_k", "top_p", "min_p", "uniform", "forced")


class Row(NamedTuple):
    """One request's part of a step: its newest tokens, whose keys go into its pages.

    ``position`` is that of the first of ``tokens``. ``uniforms`` in [0, 1) decide the draws of
    this step and of those that follow it, ``stop_tokens`` end those. ``forced`` is a token to take
    instead of choosing, or -1. ``edits`` changes the logits before a token is chosen. ``num_top``
    asks for so many of the likeliest tokens. ``scored`` are the tokens that follow the first
    ``len(scored)`` of ``tokens`` and whose log-probabilities are wanted, each with
    ``num_scored_top`` of the likeliest.
    """

    tokens: Sequence[int]
    position: int
    pages: Sequence[int]
    slot: int
    sampling: SamplingParams
    uniforms: Sequence[float] = ()
    stop_tokens: Collection[int] = ()
    forced: int = -1
    edits: Edits | None = None
    num_top: int = 0
    scored: Sequence[int] = ()
    num_scored_top: int = 0


class StepInputs:
    """Buffers for steps of at most ``max_tokens`` tokens of ``max_sequences`` requests.

    ``max_steps`` may follow one another without a batch being written for each; see
    `fssa_kernels.advance_step`, which reads and writes what they need for that.

    Attributes:
        per_token: ``tokens``, ``positions``, ``slots``, ``kv_slots``: ``[max_tokens]`` int32.
        per_sequence: ``block_tables [max_sequences, max_pages]`` int32, and ``[max_sequences]``
            ``kv_lens``, ``last`` (the row of a request's newest token) and arguments of ``sample``;
            ``draws [max_sequences, max_steps]``, ``stop_tokens [max_sequences, MAX_STOP_TOKENS]``,
            ``num_done`` and ``ended`` are those of ``advance_step``.
        q_indptr: ``[max_sequences + 1]`` int32: where each request's tokens begin.

    All on the model's device. Rows past the batch are idle: nobody's user, no cached tokens, and
    their keys go nowhere.
    """

    def __init__(
        self,
        max_tokens: int,
        max_sequences: int,
        max_pages: int,
        page_size: int,
        device: torch.device,
        max_steps: int = 1,
    ) -> None:
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            **{name: (torch.int32, (max_tokens,)) for name in _PER_TOKEN},
            "block_tables": (torch.int32, (max_sequences, max_pages)),
            **{name: (dtype, (max_sequences,)) for name, dtype in _PER_SEQUENCE.items()},
            "draws": (torch.float32, (max_sequences, max_steps)),
            "stop_tokens": (torch.int32, (max_sequences, MAX_STOP_TOKENS)),
            "q_indptr": (torch.int32, (max_sequences + 1,)),
        }
        self._copied: tuple[torch.Tensor, torch.Tensor] | None = None
        if device.type == "cuda":
            # Whole 16 bytes each, so that kernels may read any of them in pieces of that size.
            ends = list(accumulate(-(-math.prod(shape) // 4) * 4 for _, shape in shapes.values()))
            host = torch.zeros(ends[-1], dtype=torch.int32, pin_memory=True)
            self._copied = (host.to(device), host)
            on_device, on_host = (
                {
                    name: memory[start : start + math.prod(shape)].view(dtype).view(shape)
                    for start, (name, (dtype, shape)) in zip(
                        [0, *ends], shapes.items(), strict=False
                    )
                }
                for memory in self._copied
            )
        else:
            on_host = {
                name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in shapes.items()
            }
            on_device = on_host
        self._views = {name: buffer.numpy() for name, buffer in on_host.items()}
        self.per_token = {name: on_device[name] for name in _PER_TOKEN}
        self.per_sequence = {
            name: on_device[name]
            for name in ("block_tables", *_PER_SEQUENCE, "draws", "stop_tokens")
        }
        self.q_indptr = on_device["q_indptr"]
        self._page_size = page_size
        self._settled: list[tuple[SamplingParams, Collection[int], list[int]]] = []
        self._filled = (max_tokens, max_sequences)
        self._idle(0, 0)

    def fill(self, rows: Sequence[Row], steps: int = 1) -> tuple[int, int]:
        """Write a step into the buffers; (tokens, sequences) of it.

        If more than one step is to follow from it, every row has one token, and a number in
        ``uniforms`` for each step if it draws.
        """
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        kv_slots: list[int] = []
        kv_lens: list[int] = []
        bounds = [0]
        size = self._page_size
        for row in rows:
            span = range(row.position, row.position + len(row.tokens))
            tokens += row.tokens
            positions += span
            slots += [row.slot] * len(row.tokens)
            kv_slots += [row.pages[p // size] * size + p % size for p in span]
            kv_lens.append(span.stop)
            bounds.append(len(tokens))
        view, count = self._views, len(rows)
        # First, so that it knows of whatever an exception leaves half written.
        self._idle(len(tokens), count)
        for name, values in (
            ("tokens", tokens),
            ("positions", positions),
            ("slots", slots),
            ("kv_slots", kv_slots),
        ):
            view[name][: len(tokens)] = values
        view["kv_lens"][:count] = kv_lens
        view["q_indptr"][: count + 1] = bounds
        view["last"][:count] = [bound - 1 for bound in bounds[1:]]
        view["uniform"][:count] = [row.uniforms[0] if row.uniforms else 0.0 for row in rows]
        view["forced"][:count] = [row.forced for row in rows]
        if steps > 1:
            view["num_done"][:count] = 0
            for index, row in enumerate(rows):
                if row.uniforms:
                    view["draws"][index, :steps] = row.uniforms
        # Pages and sampling settings of a request stay as they are while it runs.
        if not self._is_settled(rows):
            self._settled = []  # an exception may leave the buffers half written
            self._settle(rows)
            self._settled = [(row.sampling, row.stop_tokens, list(row.pages)) for row in rows]
        if self._copied is not None:
            device_memory, host_memory = self._copied
            device_memory.copy_(host_memory, non_blocking=True)
        return len(tokens), count

    def _idle(self, num_tokens: int, num_sequences: int) -> None:
        """Make rows of the step before harmless: a graph may compute some past those asked for."""
        if self._filled == (num_tokens, num_sequences):
            return
        view = self._views
        for name in _PER_TOKEN:
            view[name][num_tokens : self._filled[0]] = -1 if name == "kv_slots" else 0
        view["kv_lens"][num_sequences : self._filled[1]] = 0
        view["last"][num_sequences : self._filled[1]] = 0
        view["q_indptr"][num_sequences + 1 :] = num_tokens
        self._filled = (num_tokens, num_sequences)

    def _is_settled(self, rows: Sequence[Row]) -> bool:
        """Whether the buffers hold these rows' pages and settings.

        The settings themselves are kept, so that none can be freed and another take its address.
        """
        return len(rows) == len(self._settled) and all(
            row.sampling is sampling and row.pages == pages and row.stop_tokens == stop_tokens
            for row, (sampling, stop_tokens, pages) in zip(rows, self._settled, strict=True)
        )

    def _settle(self, rows: Sequence[Row]) -> None:
        view = self._views
        for index, row in enumerate(rows):
            view["block_tables"][index, : len(row.pages)] = row.pages
            view["stop_tokens"][index] = -1
            view["stop_tokens"][index, : len(row.stop_tokens)] = list(row.stop_tokens)
            view["temperature"][index] = row.sampling.temperature
            view["top_k"][index] = row.sampling.top_k
            view["top_p"][index] = row.sampling.top_p
            view["min_p"][index] = row.sampling.min_p
