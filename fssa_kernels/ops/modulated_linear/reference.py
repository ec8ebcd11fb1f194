"""PyTorch maths of the modulated linear: the oracle, the fallback and the documentation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fssa_kernels.checks import pick, sum_by_index
from fssa_kernels.packed import PackedMatrix, unpacked


def modulated_linear_ref(
    x: Tensor,
    weight: Tensor | PackedMatrix,
    bias: Tensor | None,
    lora_a: Tensor | PackedMatrix | None,
    lora_b: Tensor | PackedMatrix | None,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: Sequence[int],
    epilogue: str,
) -> Tensor:
    """y = x W^T + b + low-rank term, then the epilogue; arguments as in the public function.

    The base product is taken in x.dtype, the low-rank term in fp32 (fp64 for fp64 x), and their
    sum is rounded to x.dtype once more. Where the modulation is zero, so is the term: the base
    product comes through unchanged.
    """
    y = F.linear(x, unpacked(weight), bias)
    if lora_a is not None and lora_b is not None:
        lora_a, lora_b = unpacked(lora_a), unpacked(lora_b)
        if family == "factors":
            assert slots is not None
            _add_factors(y, x, lora_a, lora_b, slots, splits)
        else:
            add_shared(y, x, lora_a, lora_b, rows, slots, family, splits, wide(x.dtype))
    return apply_epilogue(y, epilogue)


def add_shared(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: Sequence[int],
    products: torch.dtype,
) -> None:
    """Add the low-rank term whose A and B all rows share to y, in place.

    Its two products are taken in the dtype `products`; what each user does to u between them is
    not: it is in fp32, or fp64.
    """
    u = widen(F.linear(x.to(products), lora_a.to(products)))
    u = modulate(u, rows, slots, family).to(products)
    _add_low_rank(y, u, lora_b.to(products), splits)


def modulate(u: Tensor, rows: Tensor | None, slots: Tensor | None, family: str) -> Tensor:
    """u [T,S*R] seen by each row's user: u * g (gated), M u per projection (core), u (static)."""
    if family == "static":
        return u
    assert rows is not None
    assert slots is not None
    state = widen(pick("modulated_linear", "slots", rows, slots))
    if family == "gated":
        return u * state
    num_tokens, num_splits, rank, _ = state.shape
    return (state @ u.view(num_tokens, num_splits, rank, 1)).view(num_tokens, num_splits * rank)


def modulate_bwd(du: Tensor, rows: Tensor | None, slots: Tensor | None) -> Tensor:
    """From the gradient of u' to that of u: du' * g, M^T du', or du' itself for static."""
    if rows is None or slots is None:
        return du
    state = widen(pick("modulated_linear", "slots", rows, slots))
    if state.dim() == 2:
        return du * state
    num_tokens, num_splits, rank, _ = state.shape
    return (state.mT @ du.reshape(num_tokens, num_splits, rank, 1)).reshape(num_tokens, -1)


def _add_low_rank(y: Tensor, u: Tensor, lora_b: Tensor, splits: Sequence[int]) -> None:
    """Add u_s B_s^T to the columns of every projection s, in place."""
    rank = lora_b.shape[1]
    parts = zip(y.split(splits, 1), u.split(rank, 1), lora_b.split(splits), strict=True)
    for y_s, u_s, b_s in parts:
        add_product(y_s, u_s, b_s.t())


def add_product(y: Tensor, a: Tensor, b: Tensor) -> None:
    """y += a b, rounded to y's dtype once."""
    if y.dtype == a.dtype:
        y.addmm_(a, b)  # without a product of its own in memory
    else:
        y.add_(a @ b)


def _add_factors(
    y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, slots: Tensor, splits: Sequence[int]
) -> None:
    """Add each row's own low-rank product to y, one user after another."""
    for slot in slots.unique():
        mine = (slots == slot).nonzero().squeeze(1)
        a = pick("modulated_linear", "slots", lora_a, slot)[0]
        b = pick("modulated_linear", "slots", lora_b, slot)[0]
        y_mine = y[mine]
        _add_low_rank(y_mine, F.linear(widen(x[mine]), widen(a)), widen(b), splits)
        y[mine] = y_mine


def apply_epilogue(y: Tensor, epilogue: str) -> Tensor:
    """act(y[:, :N/2]) * y[:, N/2:], or y itself for "none"."""
    if epilogue == "none":
        return y
    gate, up = y.chunk(2, dim=1)
    act = F.silu(gate) if epilogue == "silu_mul" else F.gelu(gate, approximate="tanh")
    return act * up


def rows_bwd(du: Tensor, u: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """Sum over the tokens of each slot of du' * u (gated) or du' u^T (core)."""
    if rows.dim() == 2:
        per_token = du * u
    else:
        shape = (du.shape[0], *rows.shape[1:3])
        per_token = du.reshape(shape).unsqueeze(3) * u.reshape(shape).unsqueeze(2)
    return sum_by_index(per_token, slots, rows.shape[0]).to(rows.dtype)


def widen(t: Tensor) -> Tensor:
    """t in the dtype the low-rank term is computed in: fp64 stays, everything else is fp32."""
    return t.to(wide(t.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that `widen` widens to."""
    return dtype if dtype == torch.float64 else torch.float32
