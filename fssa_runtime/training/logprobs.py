"""Log-probabilities of tokens under a frozen vocabulary head, and their gradient, in little memory.

    value_i = log softmax(project(h_i))[token_i]

Row i's value depends on row i's hidden state alone, so its gradient is one vector of that size. It
is made in the forward pass, while the row's logits exist: they are computed once, for a few rows at
a time, and nothing of the vocabulary's size is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Project = Callable[[Tensor], Tensor]


def token_logprob(
    hidden: Tensor, tokens: Tensor, project: Project, *, chunk_size: int = 256
) -> Tensor:
    """log softmax(project(hidden))[i, tokens[i]] for every row i; differentiable in hidden, once.

    hidden [M, C] must already be what predicts tokens [M] (integer); project: [m, C] → [m, V], row
    by row (a language-model head, soft capping included), with no trained weights of its own.
    Returns [M] float32, reduced in float32. Logits exist for at most ``chunk_size`` rows. The
    gradient, in hidden's dtype, is rounded to the logits' before the head and to hidden's after it.

    Raises:
        ValueError: shapes that do not fit, or a head that has a gradient to collect.
    """
    if hidden.ndim != 2 or tokens.shape != hidden.shape[:1]:
        raise ValueError(
            f"tokens: expected one for each row of hidden {tuple(hidden.shape)}, "
            f"got {tuple(tokens.shape)}"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    if torch.is_grad_enabled() and hidden.requires_grad:
        values: Tensor = _WithGradient.apply(hidden, tokens, project, chunk_size)
        return values
    parts = zip(hidden.split(chunk_size), tokens.split(chunk_size), strict=True)
    found = [_pick(_log_softmax(project(rows)), wanted) for rows, wanted in parts]
    return torch.cat([hidden.new_zeros(0, dtype=torch.float32), *found])


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tokens: Tensor, project: Project, size: int) -> Tensor:
        values = hidden.new_empty(len(tokens), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(tokens), size):
            part = slice(start, start + size)
            wanted = tokens[part].long()[:, None]
            with torch.enable_grad():
                rows = hidden[part].detach().requires_grad_()
                logits = project(rows)
                _check_frozen(logits, rows)
            shares = _log_softmax(logits.detach())
            values[part] = _pick(shares, tokens[part])
            # − d value / d logits = softmax − one at the token.
            shares.exp_().scatter_add_(1, wanted, shares.new_full(wanted.shape, -1.0))
            (downhill,) = torch.autograd.grad(logits, rows, shares.to(logits.dtype))
            gradient[part] = -downhill
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, values: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * values[:, None]).to(gradient.dtype), None, None, None


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def _pick(shares: Tensor, tokens: Tensor) -> Tensor:
    return shares.gather(-1, tokens[:, None].long())[:, 0]


def _check_frozen(logits: Tensor, rows: Tensor) -> None:
    """ValueError if anything but the rows would have a gradient from the logits."""
    seen, ahead = set(), [logits.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not rows:
            raise ValueError(
                "project: expected no weights that are trained: their gradient would be lost"
            )
        ahead.extend(following for following, _ in node.next_functions)
