"""Rotary positions for q and k, and the write of k and v into the paged cache."""

from typing import Any

import torch
from torch import Tensor

from fssa_kernels.checks import (
    INDEX_DTYPES,
    bad_value,
    check_float,
    check_rank,
    check_tensor,
)
from fssa_kernels.dispatch import Backend
from fssa_kernels.ops.rope_kv_write.native_impl import cannot_native, rope_kv_write_native
from fssa_kernels.ops.rope_kv_write.reference import rope_kv_write_ref
from fssa_kernels.registration import Op, needs_grad

_NAME = "rope_kv_write"


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_slots: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Rotate q and k by their positions, store k and v in the cache, return the rotated q.

        k_cache[kv_slots[t] // P, kv_slots[t] % P] = rope(k_t),  v_cache likewise = v_t

    Arguments:
        q: [T,H,D], k, v: [T,Hkv,D], one floating dtype; may be strided views of one projection.
        positions: [T] int32, rows of cos_sin.
        cos_sin: [max_positions, rotary_dim] fp32: cosines in the first half of a row, sines in
            the second, channels paired half against half (NeoX); rotary_dim even and <= D.
        k_cache, v_cache: [num_pages,P,Hkv,D], q.dtype; written in place.
        kv_slots: [T] int32, page * P + offset, -1 for a token that is not stored. Slots of one
            call must differ.
        backend: "auto", "native" or "reference".

    Returns the rotated q [T,H,D], fresh. A row's result does not depend on the other rows.
    Inference only: raises RuntimeError where a gradient would be recorded (training rotates with
    `ops.rope_kv_write.reference.apply_rope`).

    Raises TypeError for a non-tensor or a wrong dtype; ValueError for a wrong shape, device or
    backend, and on a CPU a position or slot out of range, before anything is written.

    Source: rotary embeddings, arXiv 2104.09864; paged cache, arXiv 2309.06180.
    """
    inputs = _prepare(q, k, v, positions, cos_sin, k_cache, v_cache, kv_slots, backend=backend)
    if needs_grad(q, k, v, cos_sin, k_cache, v_cache):
        raise RuntimeError(
            f"{_NAME}: inference only, but a gradient would be needed; call it under "
            "torch.no_grad() or rotate with ops.rope_kv_write.reference.apply_rope"
        )
    return _OP(*inputs)


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_slots: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """The operator's positional arguments, checked."""
    check_rank(_NAME, "q", q, "[T, H, D]", 3)
    check_float(_NAME, "q", q)
    check_rank(_NAME, "k", k, "[T, Hkv, D]", 3)
    check_rank(_NAME, "cos_sin", cos_sin, "[max_positions, rotary_dim]", 2)
    check_rank(_NAME, "k_cache", k_cache, "[num_pages, P, Hkv, D]", 4)
    dtypes, device = (q.dtype,), q.device
    num_tokens, _, head_dim = q.shape
    num_kv_heads = k.shape[1]
    kv_shape = (num_tokens, num_kv_heads, head_dim)
    check_tensor(_NAME, "k", k, kv_shape, dtypes, device)
    check_tensor(_NAME, "v", v, kv_shape, dtypes, device)
    check_tensor(_NAME, "positions", positions, (num_tokens,), INDEX_DTYPES, device)
    rotary_dim = cos_sin.shape[1]
    if rotary_dim % 2 or rotary_dim > head_dim:
        expected = f"an even rotary_dim of at most D = {head_dim}"
        bad_value(_NAME, "cos_sin", expected, f"shape {tuple(cos_sin.shape)}")
    check_tensor(_NAME, "cos_sin", cos_sin, cos_sin.shape, (torch.float32,), device)
    num_pages, page_size = k_cache.shape[:2]
    cache_shape = (num_pages, page_size, num_kv_heads, head_dim)
    check_tensor(_NAME, "k_cache", k_cache, cache_shape, dtypes, device)
    check_tensor(_NAME, "v_cache", v_cache, cache_shape, dtypes, device)
    check_tensor(_NAME, "kv_slots", kv_slots, (num_tokens,), INDEX_DTYPES, device)
    return q, k, v, positions, cos_sin, k_cache, v_cache, kv_slots, backend


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_slots: Tensor,
    backend: str,
) -> Tensor:
    return q.new_empty(q.shape)


_OP = Op(
    _NAME,
    "(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor cos_sin, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor kv_slots, str backend) -> Tensor",
    prepare=_prepare,
    backends=(
        Backend("native", rope_kv_write_native, cannot_native, records=True),
        Backend("reference", rope_kv_write_ref),
    ),
    fake=_fake,
    mutates=("k_cache", "v_cache"),
)
