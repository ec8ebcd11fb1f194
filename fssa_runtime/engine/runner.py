"""One step of the model for whatever is in flight: static buffers, filled and replayed.

Everything a step reads lies in buffers whose addresses never change, so the step is recorded once
(`fssa_kernels.StepGraph`) and replayed for every batch, user and length. Where it cannot be
recorded the same function runs eagerly on the filled part of the buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fssa_kernels import StepGraph, sample, take_rows
from fssa_kernels.native import RecordingError

from ..conditioning.modulation import Modulation
from ..models.attention import PagedAttention
from ..models.decoder import Decoder
from ..request import SamplingParams
from .kv_cache import KVCache


@dataclass(frozen=True)
class Row:
    """One request's part of a step: its newest tokens, whose keys go into its pages.

    ``position`` is that of the first of ``tokens``. ``uniform`` in [0, 1) decides a draw;
    ``forced`` is a token to take instead of choosing, or -1.
    """

    tokens: Sequence[int]
    position: int
    pages: Sequence[int]
    slot: int
    sampling: SamplingParams
    uniform: float = 0.0
    forced: int = -1


class Runner:
    """Runs steps of a decoder.

    Args:
        decoder: the frozen model; packed, if it can be, see `Decoder.pack`.
        cache: pages of keys and values.
        modulation: what the slots of requests refer to, or None.
        max_tokens: tokens of one step at most. max_sequences: requests of one step at most.

    Attributes:
        eager_reason: why the step is not replayed from a recording, or None if it is.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        modulation: Modulation | None,
        *,
        max_tokens: int,
        max_sequences: int,
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.modulation = modulation
        max_pages = cache.pages_for(decoder.config.max_positions)

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32)

        def floats(*shape: int) -> torch.Tensor:
            return torch.zeros(shape)

        self._per_token = {
            name: ints(max_tokens) for name in ("tokens", "positions", "slots", "kv_slots")
        }
        self._per_sequence = {
            "block_tables": ints(max_sequences, max_pages),
            "kv_lens": ints(max_sequences),
            "last": ints(max_sequences),
            "temperature": floats(max_sequences),
            "top_k": ints(max_sequences),
            "top_p": floats(max_sequences),
            "min_p": floats(max_sequences),
            "uniform": floats(max_sequences),
            "forced": ints(max_sequences),
        }
        self._q_indptr = ints(max_sequences + 1)
        self._views = {
            name: buffer.numpy()
            for name, buffer in (
                *self._per_token.items(),
                *self._per_sequence.items(),
                ("q_indptr", self._q_indptr),
            )
        }
        self._settled: list[tuple[int, Sequence[int]]] = []
        self.eager_reason: str | None = None
        self._graph: StepGraph | None = None
        if decoder.device.type != "cpu":
            self.eager_reason = f"the model is on {decoder.device}"
            return
        inputs = {
            "tokens": tuple(self._per_token.values()),
            "sequences": tuple(self._per_sequence.values()),
        }
        try:
            self._graph = StepGraph.record(
                lambda: self._step(self._per_token, self._per_sequence, self._q_indptr), inputs
            )
        except RecordingError as error:
            self.eager_reason = str(error)

    def run(self, rows: Sequence[Row]) -> tuple[list[int], list[float]]:
        """The next token of every row and its log-probability, nats.

        Raises:
            ValueError: a slot, page or position out of range, before anything is written.
        """
        num_tokens, num_sequences = self._fill(rows)
        if self._graph is not None:
            self._graph.replay(tokens=num_tokens, sequences=num_sequences)
            tokens, logprobs = self._graph.outputs
        else:
            device = self.decoder.device
            tokens, logprobs = self._step(
                {name: t[:num_tokens].to(device) for name, t in self._per_token.items()},
                {name: t[:num_sequences].to(device) for name, t in self._per_sequence.items()},
                self._q_indptr[: num_sequences + 1].to(device),
            )
        return tokens[:num_sequences].tolist(), logprobs[:num_sequences].tolist()

    def _step(
        self,
        per_token: dict[str, torch.Tensor],
        per_sequence: dict[str, torch.Tensor],
        q_indptr: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attention = PagedAttention(
            self.cache.k,
            self.cache.v,
            per_token["kv_slots"],
            per_sequence["block_tables"],
            per_sequence["kv_lens"],
            q_indptr,
        )
        modulation = self.modulation
        if modulation is not None:
            modulation = modulation.with_slots(per_token["slots"])
        hidden = self.decoder(per_token["tokens"], per_token["positions"], attention, modulation)
        logits = self.decoder.logits(take_rows(hidden, per_sequence["last"]))
        return sample(
            logits,
            per_sequence["temperature"],
            per_sequence["top_k"],
            per_sequence["top_p"],
            per_sequence["min_p"],
            per_sequence["uniform"],
            per_sequence["forced"],
        )

    def _fill(self, rows: Sequence[Row]) -> tuple[int, int]:
        """Write a step into the buffers; (tokens, sequences) of it."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        kv_slots: list[int] = []
        kv_lens: list[int] = []
        bounds = [0]
        size = self.cache.page_size
        for row in rows:
            span = range(row.position, row.position + len(row.tokens))
            tokens += row.tokens
            positions += span
            slots += [row.slot] * len(row.tokens)
            kv_slots += [row.pages[p // size] * size + p % size for p in span]
            kv_lens.append(span.stop)
            bounds.append(len(tokens))
        view, count = self._views, len(rows)
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
        view["uniform"][:count] = [row.uniform for row in rows]
        view["forced"][:count] = [row.forced for row in rows]
        # Pages and sampling settings of a request stay as they are while it runs.
        settled = [(id(row.sampling), row.pages) for row in rows]
        if settled != self._settled:
            self._settle(rows)
            self._settled = [(key, list(pages)) for key, pages in settled]
        return len(tokens), count

    def _settle(self, rows: Sequence[Row]) -> None:
        view = self._views
        for index, row in enumerate(rows):
            view["block_tables"][index, : len(row.pages)] = row.pages
            view["temperature"][index] = row.sampling.temperature
            view["top_k"][index] = row.sampling.top_k
            view["top_p"][index] = row.sampling.top_p
            view["min_p"][index] = row.sampling.min_p
