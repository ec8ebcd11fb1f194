"""What an answer's settings do to the logits before a token is chosen from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ..sampling import SamplingParams
from .grammar import Matcher


class Edits:
    """Penalties, biases, stop tokens that may not come yet, and a grammar, for one answer.

    Args:
        sampling: what is asked for; the formula stands there.
        prompt: the prompt's tokens.
        stop_tokens: tokens that would end the answer.
        matcher: of the grammar, at its beginning, if there is one.

    Attributes:
        error: why the answer cannot go on, or None.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        prompt: Sequence[int],
        stop_tokens: Iterable[int],
        matcher: Matcher | None,
    ) -> None:
        self.error: str | None = None
        self._sampling = sampling
        self._stop_tokens = torch.tensor(sorted(stop_tokens), dtype=torch.long)
        self._matcher = matcher
        self._num_written = 0
        self._bias_tokens = torch.tensor(list(sampling.logit_bias), dtype=torch.long)
        self._biases = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32)
        # Tokens seen so far, each once, with how often it was written.
        self._seen = np.unique(np.asarray(prompt, dtype=np.int64))
        self._counts = np.zeros(len(self._seen), dtype=np.float32)
        self._places = {int(token): place for place, token in enumerate(self._seen)}
        self._penalised = bool(
            sampling.repetition_penalty != 1
            or sampling.presence_penalty
            or sampling.frequency_penalty
        )

    @property
    def at_end(self) -> bool:
        """Whether the grammar lets nothing but an end follow."""
        return self._matcher is not None and self._matcher.at_end

    def apply(self, logits: torch.Tensor) -> None:
        """Edit a row of logits ``[V]`` fp32, in place."""
        if self._penalised:
            self._penalise(logits)
        if len(self._bias_tokens):
            tokens = self._bias_tokens.to(logits.device)
            logits[tokens] += self._biases.to(logits.device)
        if self._num_written < self._sampling.min_tokens:
            logits[self._stop_tokens.to(logits.device)] = float("-inf")
        if self._matcher is not None:
            self._matcher.rule_out(logits)

    def accept(self, token: int) -> None:
        """A token was written."""
        self._num_written += 1
        if self._penalised:
            place = self._places.get(token)
            if place is None:
                place = self._places[token] = len(self._places)
                if place == len(self._seen):  # twice the room, so that growing costs little
                    self._seen = np.resize(self._seen, max(64, 2 * place))
                    self._counts = np.resize(self._counts, max(64, 2 * place))
                self._seen[place], self._counts[place] = token, 0
            self._counts[place] += 1
        if self._matcher is not None:
            self.error = self._matcher.accept(token)

    def _penalise(self, logits: torch.Tensor) -> None:
        sampling, size = self._sampling, len(self._places)
        tokens = torch.from_numpy(self._seen[:size]).to(logits.device)
        counts = torch.from_numpy(self._counts[:size]).to(logits.device)
        values = logits[tokens]
        penalty = sampling.repetition_penalty
        values = torch.where(values > 0, values / penalty, values * penalty)
        values -= sampling.frequency_penalty * counts
        values -= sampling.presence_penalty * (counts > 0)
        logits[tokens] = values
