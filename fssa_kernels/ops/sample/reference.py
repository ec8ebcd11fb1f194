"""PyTorch maths of choosing tokens."""

import torch
from torch import Tensor

from fssa_kernels.checks import bad_value, bounded, can_check


def sample_ref(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    forced: Tensor,
) -> tuple[Tensor, Tensor]:
    """(tokens, logprobs); probabilities in fp64, log-probabilities in fp32."""
    wide = logits.double()
    vocab_size = logits.shape[1]
    if forced.numel() and can_check(logits):
        lowest, highest = (int(bound) for bound in forced.aminmax())
        if lowest < -1 or highest >= vocab_size:
            bad_value(
                "sample", "forced", f"-1 or values in [0, {vocab_size})", str(forced.tolist())
            )
    greedy = wide.argmax(1)
    shifted = wide - wide.amax(1, keepdim=True)
    scaled = shifted / torch.where(temperature > 0, temperature, 1.0).double()[:, None]
    drawn = _draw(scaled.exp(), top_k, top_p, min_p, uniform)
    tokens = torch.where(temperature > 0, drawn, greedy)
    tokens = torch.where(forced >= 0, forced.long(), tokens)
    inside, bad = bounded(tokens, vocab_size)
    logprobs = wide.log_softmax(1).gather(1, inside[:, None])[:, 0].masked_fill(bad, float("nan"))
    return tokens.int(), logprobs.float()


def _draw(weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """One index of each row of ``weights [B,V]``, whose largest is 1."""
    vocab_size = weights.shape[1]
    # Stable and descending: of equal weights the smaller index comes first.
    ordered, index = weights.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(vocab_size, device=weights.device)
    limit = torch.where(top_k > 0, top_k, vocab_size)[:, None]
    ordered = torch.where(rank < limit, ordered, 0.0)
    before = ordered.cumsum(1) - ordered
    nucleus = before < top_p.double()[:, None] * ordered.sum(1, keepdim=True)
    kept = (nucleus | (rank == 0) | (top_p >= 1)[:, None]) & (ordered >= min_p.double()[:, None])
    mass = torch.zeros_like(weights).scatter(1, index, torch.where(kept, ordered, 0.0))
    reached = mass.cumsum(1) > uniform.double()[:, None] * mass.sum(1, keepdim=True)
    # The last index with any mass, should rounding let no sum pass the target.
    last = torch.where(mass > 0, rank, 0).amax(1)
    return torch.where(reached.any(1), reached.int().argmax(1), last)
