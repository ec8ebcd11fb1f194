"""From a row of logits to a token and its log-probability."""

from __future__ import annotations

import torch

from ..request import SamplingParams


def choose(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator | None) -> int:
    """One token from ``logits [V]`` (float32).

    Temperature 0 takes the largest; else a draw after temperature, top-k and top-p. Each row has a
    generator of its own, so a draw does not depend on the rest of the batch. Of equal logits the
    smallest token id counts as the larger.
    """
    if params.temperature == 0:
        return int(logits.argmax())
    scaled = logits / params.temperature
    ordered, tokens = scaled.sort(descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if params.top_k:
        keep[params.top_k :] = False
    if params.top_p < 1:
        # A token stays while the mass before it is below top_p: the first always does.
        keep &= probabilities.cumsum(-1) - probabilities < params.top_p
    kept = torch.where(keep, probabilities, 0.0)
    return int(tokens[torch.multinomial(kept, 1, generator=generator)])
