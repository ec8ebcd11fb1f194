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
from fssa_kernels.gpu.backend import triton_backend
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
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    weight_offset: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Rotate q and k by their positions, store k and v in the cache, return the rotated q.

        k_cache[kv_slots[t] // P, kv_slots[t] % P] = rope(norm(k_t)),  v_cache likewise = v_t
        norm(x) = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)   over each head, if wanted

    Arguments:
        q: [T,H,D], k, v: [T,Hkv,D], one floating dtype; may be strided views of one projection.
        positions: [T] int32, rows of cos_sin.
        cos_sin: [max_positions, rotary_dim] fp32: cosines in the first half of a row, sines in
            the second, channels paired half against half (NeoX); rotary_dim even and <= D.
        k_cache, v_cache: [num_pages,P,Hkv,D], q.dtype; written in place.
        kv_slots: [T] int32, page * P + offset, -1 for a token that is not stored. Slots of one
            call must differ.
        q_norm, k_norm: [D], q.dtype or fp32: weights of a norm of every head before the rotation,
            rounded to q.dtype; None for none. eps, weight_offset: of both, see
            `residual_film_rms_norm`.
        backend: "auto", "native", "triton" or "reference".

    Returns the rotated q [T,H,D], fresh. A row's result does not depend on the other rows.
    Inference only: raises RuntimeError where a gradient would be recorded (training rotates with
    `ops.rope_kv_write.reference.apply_rope`).

    Raises TypeError for a non-tensor or a wrong dtype; ValueError for a wrong shape, device or
    backend, and on a CPU a position or slot out of range, before anything is written (on a GPU the
    token of a bad position has a NaN row of q and stores a NaN k; a bad slot stores nothing).

    Source: rotary embeddings, arXiv 2104.09864; paged cache, arXiv 2309.06180.
    """
    inputs = _prepare(
        q,
        k,
        v,
        positions,
        cos_sin,
        k_cache,
        v_cache,
        kv_slots,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
        weight_offset=weight_offset,
        backend=backend,
    )
    if needs_grad(q, k, v, cos_sin, k_cache, v_cache, q_norm, k_norm):
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
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    weight_offset: float = 0.0,
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
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check_tensor(_NAME, name, weight, (head_dim,), (q.dtype, torch.float32), device)
    if not eps >= 0:
        bad_value(_NAME, "eps", "a number >= 0", repr(eps))
    cache = (k_cache, v_cache, kv_slots)
    return q, k, v, positions, cos_sin, *cache, q_norm, k_norm, eps, weight_offset, backend


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_slots: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    weight_offset: float,
    backend: str,
) -> Tensor:
    return q.new_empty(q.shape)


_OP = Op(
    _NAME,
    "(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor cos_sin, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor kv_slots, Tensor? q_norm, Tensor? k_norm, float eps, "
    "float weight_offset, str backend) -> Tensor",
    prepare=_prepare,
    backends=(
        Backend("native", rope_kv_write_native, cannot_native, records=True),
        triton_backend("fssa_kernels.ops.rope_kv_write.triton_impl", "rope_kv_write_triton"),
        Backend("reference", rope_kv_write_ref),
    ),
    fake=_fake,
)
