"""One step of the model for whatever is in flight: static buffers, filled and replayed.

Everything a step reads lies in buffers whose addresses never change, so the step is recorded once
(`fssa_kernels.StepGraph`) and replayed for every batch, user and length. Where it cannot be
recorded the same function runs eagerly on the filled part of the buffers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from fssa_kernels import Following, StepGraph, advance_step, sample, take_rows
from fssa_kernels.native import RecordingError

from ..conditioning.modulation import Modulation
from ..models.attention import PagedAttention
from ..models.decoder import Decoder
from ..request import PromptToken
from .kv_cache import KVCache
from .step_inputs import DRAWS, Row, StepInputs

# Steps of more tokens are not captured as CUDA graphs.
_MAX_GRAPH_TOKENS = 256
# Rows of logits that are made at a time where every token of a prompt is scored.
_SCORED_ROWS = 64


class Chosen(NamedTuple):
    """What a step gave one row: a token, its log-probability in nats, the likeliest tokens and the
    scores of its own tokens where they were asked for."""

    token: int
    logprob: float
    top: dict[int, float] | None = None
    scores: list[PromptToken] | None = None


class Interrupt:
    """As a `threading.Event` that nobody waits for: native code looks at it between two steps."""

    def __init__(self) -> None:
        self.memory = torch.zeros(1, dtype=torch.int32)
        self._view = self.memory.numpy()

    def set(self) -> None:
        """From any thread: end what runs after the step at hand, until `clear`."""
        self._view[0] = 1

    def clear(self) -> None:
        self._view[0] = 0


class _Computed(NamedTuple):
    """Results of a step, by row of the static buffers: the first ones count."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    logits: torch.Tensor  # of every sequence's newest token
    hidden: torch.Tensor  # of every token


class Runner:
    """Runs steps of a decoder.

    Args:
        decoder: the frozen model; packed, if it can be, see `Decoder.pack`.
        cache: pages of keys and values.
        modulation: what the slots of requests refer to, or None.
        max_tokens: tokens of one step at most. max_sequences: requests of one step at most.
        max_steps: steps of one run at most.

    Attributes:
        eager_reason: why the step is not replayed from a recording, or None if it is.
        interrupt: ends a run after the step at hand.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        modulation: Modulation | None,
        *,
        max_tokens: int,
        max_sequences: int,
        max_steps: int = 1,
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
            max_steps,
        )
        self.interrupt = Interrupt()
        self._log_tokens = torch.zeros(max_sequences, max_steps, dtype=torch.int32)
        self._log_logprobs = torch.zeros(max_sequences, max_steps)
        self.eager_reason: str | None = None
        self._graph: StepGraph | None = None
        inputs = {"tokens": self._inputs.per_token, "sequences": self._inputs.per_sequence}
        following = Following(
            self._advance, self._inputs.per_sequence["ended"], self.interrupt.memory
        )
        try:
            self._graph = StepGraph.record(
                lambda rows: self._step(rows["tokens"], rows["sequences"]), inputs, following
            )
        except RecordingError as error:
            self.eager_reason = str(error)
        self._max_steps = max_steps

    @property
    def max_steps(self) -> int:
        """Steps of one run at most; 1 where they cannot follow one another without Python."""
        can_repeat = self._graph is not None and self._graph.can_repeat
        return self._max_steps if can_repeat else 1

    def run(
        self, rows: Sequence[Row], steps: int = 1, seconds: float = math.inf
    ) -> list[list[Chosen]]:
        """The next token of every row; of several steps that follow one another, of each.

        Rows that ask for no more than that cost no more: what edits logits or reports more of them
        works on its own rows, after the step.

        ``steps`` above 1, up to `max_steps`, are for rows of one token each that ask for nothing
        more. There may be fewer: none begins after a row has met one of its stop tokens or a
        log-probability that is not a number, after `interrupt`, and none that might end later than
        ``seconds`` after the first began.

        Raises:
            ValueError: on a CPU, a slot, page or position out of range, before anything is written.
        """
        num_tokens, num_sequences = self._inputs.fill(rows, steps)
        if steps > 1:
            return self._repeat(num_tokens, steps, seconds)
        computed = self._compute(num_tokens, num_sequences)
        edited = [index for index, row in enumerate(rows) if row.edits is not None]
        if edited:
            self._choose_anew(computed, rows, edited)
        tokens, logprobs = computed.tokens[:num_sequences], computed.logprobs[:num_sequences]
        chosen = list(map(Chosen, tokens.tolist(), logprobs.tolist()))
        end = 0
        for index, row in enumerate(rows):
            start, end = end, end + len(row.tokens)
            if row.num_top:
                one = slice(index, index + 1)
                (top,) = _likeliest(
                    computed.logits[one], computed.tokens[one], computed.logprobs[one], row.num_top
                )
                chosen[index] = chosen[index]._replace(top=top)
            if row.scored:
                scores = self._score(computed.hidden[start:end], row.scored, row.num_scored_top)
                chosen[index] = chosen[index]._replace(scores=scores)
        return [chosen]

    def _repeat(self, num_rows: int, steps: int, seconds: float) -> list[list[Chosen]]:
        assert self._graph is not None
        counts = {"tokens": num_rows, "sequences": num_rows}
        done = self._graph.repeat(counts, steps, seconds)
        tokens, logprobs = (
            log[:num_rows, :done].t().tolist() for log in (self._log_tokens, self._log_logprobs)
        )
        return [list(map(Chosen, *step)) for step in zip(tokens, logprobs, strict=True)]

    def _advance(self, computed: _Computed) -> None:
        """Between two steps that follow one another."""
        per_token, per_sequence = self._inputs.per_token, self._inputs.per_sequence
        advance_step(
            computed.tokens,
            computed.logprobs,
            per_token["tokens"],
            per_token["positions"],
            per_token["kv_slots"],
            per_sequence["kv_lens"],
            per_sequence["block_tables"],
            per_sequence["uniform"],
            per_sequence["draws"],
            per_sequence["stop_tokens"],
            per_sequence["num_done"],
            self._log_tokens,
            self._log_logprobs,
            per_sequence["ended"],
            page_size=self.cache.page_size,
        )

    def _choose_anew(self, computed: _Computed, rows: Sequence[Row], edited: list[int]) -> None:
        """Choose the tokens of some rows from edited logits, in place of those chosen."""
        index = torch.tensor(edited, device=computed.logits.device)
        model_logits = computed.logits[index]
        logits = model_logits.to(torch.float32, copy=True)
        for row_logits, row in zip(logits, (rows[i] for i in edited), strict=True):
            assert row.edits is not None
            row.edits.apply(row_logits)
        draws = {name: self._inputs.per_sequence[name][index] for name in DRAWS}
        tokens, _ = _draw(logits, draws)
        # The same operator gives the probability that the model itself gave the token.
        _, logprobs = _draw(model_logits, {**draws, "forced": tokens})
        computed.tokens[index] = tokens
        computed.logprobs[index] = logprobs

    def _score(
        self, hidden: torch.Tensor, targets: Sequence[int], num_top: int
    ) -> list[PromptToken]:
        """Scores of the tokens that follow the first ``len(targets)`` rows of ``hidden [T,C]``."""
        scores: list[PromptToken] = []
        for start in range(0, len(targets), _SCORED_ROWS):
            follow = targets[start : start + _SCORED_ROWS]
            logits = self.decoder.logits(hidden[start : start + len(follow)])
            zeros = logits.new_zeros(len(follow), dtype=torch.float32)
            none = zeros.int()
            forced = torch.tensor(follow, dtype=torch.int32, device=logits.device)
            _, logprobs = sample(logits, zeros, none, zeros + 1, zeros, zeros, forced)
            tops: list[dict[int, float]] = [{}] * len(follow)
            if num_top:
                tops = _likeliest(logits, forced, logprobs, num_top)
            scores += map(PromptToken, follow, logprobs.tolist(), tops)
        return scores

    def _compute(self, num_tokens: int, num_sequences: int) -> _Computed:
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
    ) -> _Computed:
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
        tokens, logprobs = _draw(logits, per_sequence)
        return _Computed(tokens, logprobs, logits, hidden)


def _draw(
    logits: torch.Tensor, draws: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(token, its log-probability) of every row, by the rows' own settings."""
    temperature, top_k, top_p, min_p, uniform, forced = (draws[name] for name in DRAWS)
    return sample(logits, temperature, top_k, top_p, min_p, uniform, forced)


def _likeliest(
    logits: torch.Tensor, tokens: torch.Tensor, logprobs: torch.Tensor, count: int
) -> list[dict[int, float]]:
    """Of every row ``[V]`` the likeliest tokens with their log-probabilities, nats.

    ``logprobs [B]`` of ``tokens [B]`` are known: a token's own is that and the difference of the
    logits, so that what is said twice is the same twice.
    """
    values, likeliest = logits.topk(min(count, logits.shape[-1]), -1)
    known = logits.gather(-1, tokens.long()[:, None])
    result = (logprobs.double()[:, None] + (values.double() - known.double())).float()
    return [
        dict(zip(*row, strict=True))
        for row in zip(likeliest.tolist(), result.tolist(), strict=True)
    ]
