"""Gradient of the modulated linear, by formula.

With y = x W^T + b + low, u = x A^T, u' = u * g (gated), M u (core) or u (static), per projection:

    dW = dy^T x      db = sum_t dy_t      du' = dy B      dB = dy^T u'
    dg[slot_t] += du'_t * u_t      dM[slot_t] += du'_t u_t^T
    du = du' * g, M^T du' or du'   dA = du^T x            dx = dy W + du A

factors has its own A and B for every slot, so its sums run over the rows of that slot only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fssa_kernels.dispatch import Backend
from fssa_kernels.gpu.backend import triton_backend
from fssa_kernels.ops.modulated_linear.reference import (
    add_product,
    modulate,
    modulate_bwd,
    rows_bwd,
    wide,
    widen,
)
from fssa_kernels.ops.modulated_linear.vendor_impl import avoid_vendor, no_products
from fssa_kernels.registration import Op


def modulated_linear_bwd_ref(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: Sequence[int],
    needs: Sequence[bool],
) -> list[Tensor]:
    """The needed ones of dx, dW, db, dA, dB and drows, in that order.

    dy: [T,N] (there is no epilogue here). `needs` says which of the six are wanted. weight is read
    for dx, lora_a and lora_b for all but dW and db, x for all but dx and db.
    """
    inputs = (dy, x, weight, lora_a, lora_b, rows, slots, family, splits, needs)
    return _all_bwd(wide(dy.dtype), *inputs)


def _bwd_vendor(dy: Tensor, *inputs: Any) -> list[Tensor]:
    """The same where `vendor_impl` computes the forward."""
    return _all_bwd(dy.dtype, dy, *inputs)


def _cannot_vendor_bwd(dy: Tensor, *inputs: Any) -> str | None:
    return no_products(dy, inputs[6])


def _all_bwd(
    products: torch.dtype,
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: Sequence[int],
    needs: Sequence[bool],
) -> list[Tensor]:
    """`modulated_linear_bwd_ref`, the low-rank term's products taken in the dtype `products`."""
    need_x, need_weight, need_bias, *need_side = needs
    dx = dweight = dbias = da = db = drows = None
    if need_x:
        assert weight is not None
        dx = dy @ weight
    if need_weight:
        assert x is not None
        dweight = dy.t() @ x
    if need_bias:
        dbias = dy.sum(0)
    if lora_a is not None and lora_b is not None:
        low_needs = (need_x, *need_side)
        if family == "factors":
            assert slots is not None
            da, db = _factors_bwd(dx, dy, x, lora_a, lora_b, slots, splits, low_needs)
        else:
            du, da, db, drows = _shared_bwd(
                dy, x, lora_a, lora_b, rows, slots, family, splits, low_needs, products
            )
            if dx is not None and du is not None:
                add_product(dx, du, lora_a.to(products))
    return [grad for grad in (dx, dweight, dbias, da, db, drows) if grad is not None]


def _shared_bwd(
    dy: Tensor,
    x: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: Sequence[int],
    needs: Sequence[bool],
    products: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(du, dA, dB, drows) where all rows share A and B.

    `needs` says which of dx (for du), dA, dB and drows are wanted; x is only read for the last
    three. Matrices meet in the dtype `products`; what each user does between them is in fp32, or
    fp64.
    """
    need_x, need_a, need_b, need_rows = needs
    dy_parts = dy.to(products).split(splits, 1)
    b_parts = lora_b.to(products).split(splits)
    x = None if x is None else x.to(products)
    u = None
    if x is not None and (need_b or need_rows):
        u = widen(x @ lora_a.to(products).t())
    du = da = db = drows = None
    if need_b:
        assert u is not None
        mixed = modulate(u, rows, slots, family).to(products)
        u_parts = mixed.split(lora_b.shape[1], 1)
        # u'^T dy, not dy^T u': the wide one of the two is read along its rows.
        parts = [(u_s.t() @ dy_s).t() for dy_s, u_s in zip(dy_parts, u_parts, strict=True)]
        db = torch.cat(parts).to(lora_b.dtype)
    if need_x or need_a or need_rows:
        du = torch.cat([dy_s @ b_s for dy_s, b_s in zip(dy_parts, b_parts, strict=True)], 1)
        du = widen(du)
        if need_rows:
            assert rows is not None
            assert slots is not None
            assert u is not None
            drows = rows_bwd(du, u, rows, slots)
        if need_x or need_a:
            du = modulate_bwd(du, rows, slots).to(products)
        if need_a:
            assert x is not None
            da = (du.t() @ x).to(lora_a.dtype)
    return du, da, db, drows


def _factors_bwd(
    dx: Tensor | None,
    dy: Tensor,
    x: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    slots: Tensor,
    splits: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """(dA, dB) where every slot has its own A and B; adds the low-rank term's part to dx."""
    _, need_a, need_b, _ = needs
    all_da = lora_a.new_zeros(lora_a.shape) if need_a else None
    all_db = lora_b.new_zeros(lora_b.shape) if need_b else None
    for slot in slots.unique():
        mine = (slots == slot).nonzero().squeeze(1)
        x_mine = None if x is None else x[mine]
        a, b = lora_a[slot], lora_b[slot]
        du, da, db, _ = _shared_bwd(
            dy[mine], x_mine, a, b, None, None, "static", splits, needs, wide(dy.dtype)
        )
        if dx is not None and du is not None:
            dx_mine = dx[mine]
            add_product(dx_mine, du, widen(a))
            dx[mine] = dx_mine
        if all_da is not None and da is not None:
            all_da[slot] = da
        if all_db is not None and db is not None:
            all_db[slot] = db
    return all_da, all_db


def save_for_bwd(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the needed gradients read, and nothing else."""
    x, weight, _, lora_a, lora_b, rows, slots, family, splits, epilogue, _ = inputs
    if epilogue != "none":
        raise RuntimeError(
            "modulated_linear: the operator has no gradient through its epilogue; "
            "call fssa_kernels.modulated_linear, which composes it under grad"
        )
    need_x, need_weight, _, need_a, need_b, need_rows = ctx.needs_input_grad[:6]
    need_low = family != "none" and (need_x or need_a or need_b or need_rows)
    ctx.family, ctx.splits = family, splits
    ctx.save_for_backward(
        x if need_weight or need_a or need_b or need_rows else None,
        weight if need_x else None,
        lora_a if need_low else None,
        lora_b if need_low else None,
        rows if need_low else None,
        slots if need_low else None,
    )


def modulated_linear_bwd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients for the forward operator's inputs, None where none is needed."""
    needs = list(ctx.needs_input_grad[:6])
    grads = iter(OP_BWD(dy, *ctx.saved_tensors, ctx.family, ctx.splits, needs, "auto"))
    return (*(next(grads) if need else None for need in needs), None, None, None, None, None)


def _fake_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: Sequence[int],
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    grads = []
    if needs[0]:
        assert weight is not None
        grads.append(dy.new_empty(dy.shape[0], weight.shape[1]))
    if needs[1]:
        assert x is not None
        grads.append(dy.new_empty(dy.shape[1], x.shape[1]))
    if needs[2]:
        grads.append(dy.new_empty(dy.shape[1]))
    for need, tensor in zip(needs[3:], (lora_a, lora_b, rows), strict=True):
        if need:
            assert tensor is not None
            grads.append(tensor.new_empty(tensor.shape))
    return grads


def _prepare_bwd(*inputs: Any) -> tuple[Any, ...]:
    """Nothing to check: only modulated_linear_bwd calls, with what the forward has checked."""
    return inputs


OP_BWD = Op(
    "modulated_linear_bwd",
    "(Tensor dy, Tensor? x, Tensor? weight, Tensor? lora_a, Tensor? lora_b, Tensor? rows, "
    "Tensor? slots, str family, SymInt[] splits, bool[] needs, str backend) -> Tensor[]",
    prepare=_prepare_bwd,
    backends=(
        triton_backend(
            "fssa_kernels.ops.modulated_linear.triton_bwd", "modulated_linear_bwd_triton"
        ),
        Backend("vendor", _bwd_vendor, _cannot_vendor_bwd, avoid_vendor),
        Backend("reference", modulated_linear_bwd_ref),
    ),
    fake=_fake_bwd,
)
