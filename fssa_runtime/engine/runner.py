"""One step of the model for whatever is in flight: static buffers, filled and replayed.

Everything a step reads lies in buffers whose addresses never change, so the step is recorded once
(`fssa_kernels.StepGraph`) and replayed for every batch, user and length. Where it cannot be
recorded the same function runs eagerly on the filled part of the buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fssa_kernels import StepGraph, sample, take_rows
from fssa_kernels.native import RecordingError

from ..conditioning.modulation import Modulation
from ..models.attention import PagedAttention
from ..models.decoder import Decoder
from .kv_cache import KVCache
from .step_inputs import Row, StepInputs

# Steps of more tokens are not captured as CUDA graphs.
_MAX_GRAPH_TOKENS = 256


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
        self._inputs = StepInputs(
            max_tokens,
            max_sequences,
            cache.pages_for(decoder.config.max_positions),
            cache.page_size,
            decoder.device,
        )
        self.eager_reason: str | None = None
        self._graph: StepGraph | None = None
        inputs = {"tokens": self._inputs.per_token, "sequences": self._inputs.per_sequence}
        try:
            self._graph = StepGraph.record(
                lambda rows: self._step(rows["tokens"], rows["sequences"]), inputs
            )
        except RecordingError as error:
            self.eager_reason = str(error)

    def run(self, rows: Sequence[Row]) -> tuple[list[int], list[float]]:
        """The next token of every row and its log-probability, nats.

        Raises:
            ValueError: on a CPU, a slot, page or position out of range, before anything is written.
        """
        num_tokens, num_sequences = self._inputs.fill(rows)
        tokens, logprobs = self._compute(num_tokens, num_sequences)
        return tokens[:num_sequences].tolist(), logprobs[:num_sequences].tolist()

    def _compute(self, num_tokens: int, num_sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Long prompts are limited by arithmetic, not by Python, and graphs of many lengths by
        # memory; on a CPU a recording serves every length.
        short = num_tokens <= _MAX_GRAPH_TOKENS or self.decoder.device.type == "cpu"
        if self._graph is not None and short:
            try:
                self._graph.replay(tokens=num_tokens, sequences=num_sequences)
                return self._graph.outputs
            except RecordingError as error:
                self._graph, self.eager_reason = None, str(error)
        inputs = self._inputs
        return self._step(
            {name: t[:num_tokens] for name, t in inputs.per_token.items()},
            {name: t[:num_sequences] for name, t in inputs.per_sequence.items()},
        )

    def _step(
        self,
        per_token: dict[str, torch.Tensor],
        per_sequence: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attention = PagedAttention(
            self.cache.k,
            self.cache.v,
            per_token["kv_slots"],
            per_sequence["block_tables"],
            per_sequence["kv_lens"],
            self._inputs.q_indptr[: len(per_sequence["kv_lens"]) + 1],
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
