"""Attention of decode, prefill and chunked prefill over a paged KV cache."""

from typing import Any

from torch import Tensor

from fssa_kernels.checks import (
    INDEX_DTYPES,
    bad_value,
    check_float,
    check_rank,
    check_tensor,
)
from fssa_kernels.cuda.backend import cuda_backend
from fssa_kernels.dispatch import Backend
from fssa_kernels.gpu.backend import triton_backend
from fssa_kernels.ops.paged_attention.native_impl import cannot_native, paged_attention_native
from fssa_kernels.ops.paged_attention.reference import (
    paged_attention_bwd_ref,
    paged_attention_ref,
)
from fssa_kernels.ops.paged_attention.sdpa_impl import avoid_sdpa, paged_attention_sdpa
from fssa_kernels.registration import Op

_NAME = "paged_attention"
_INPUTS = (
    "Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor kv_lens, "
    "Tensor q_indptr, float scale, int window, str backend"
)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    q_indptr: Tensor,
    *,
    scale: float,
    window: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Causal attention of each request's newest tokens over its cached keys and values.

    Request b owns the queries q_indptr[b]..q_indptr[b+1]; they are its last positions, so query i
    of n stands at position kv_lens[b] - n + i, and sees

        out = sum_j softmax_j(scale q . k_j) v_j   over positions j <= p, and j > p - window

    Key j is k_cache[block_tables[b, j // P], j % P]. One query is decode, kv_lens[b] of them
    prefill, anything between chunked prefill. H / Hkv consecutive heads share a KV head.

    Arguments:
        q: [T,H,D] floating. k_cache, v_cache: [num_pages,P,Hkv,D], q.dtype, H a multiple of Hkv,
            at least one of each.
        block_tables: [B,max_pages] int32; entries past the last page of a request are not read.
        kv_lens: [B] int32, this step's tokens included; 0 is allowed.
        q_indptr: [B+1] int32, from 0, not falling; requests without queries are allowed.
        scale: factor on q . k. window: positions a query sees, itself included; 0 for all.
        backend: "auto", "native", "triton", "cuda", "sdpa" or "reference"; the last two read
            the lengths on the host, which on a GPU waits for it; "auto" does not take "cuda",
            whose speed has not been measured.

    Returns [T,H,D] in q.dtype; zero for rows of q that belong to no request. Softmax and sums in
    fp32 (fp64 for fp64 q). A request's result does not depend on the others, nor on whatever the
    cache holds beyond its length (NaN included); with "native", "triton" and "cuda" it has the same
    bits however its prompt is cut into chunks. Differentiable in q, k_cache and v_cache, by
    computing the forward again.

    Raises TypeError for a non-tensor or a wrong dtype; ValueError for a wrong shape, device,
    window or backend, and on a CPU for lengths, bounds or pages that do not fit. On a GPU that is
    not checked: a request with such a length is NaN, as are rows that see a page that does not
    exist, and everything if the bounds are wrong.

    Source: paged cache, arXiv 2309.06180; grouped queries, arXiv 2305.13245.
    """
    return _OP(
        *_prepare(
            q,
            k_cache,
            v_cache,
            block_tables,
            kv_lens,
            q_indptr,
            scale=scale,
            window=window,
            backend=backend,
        )
    )


def _prepare(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    q_indptr: Tensor,
    *,
    scale: float,
    window: int = 0,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """The operator's positional arguments, checked."""
    check_rank(_NAME, "q", q, "[T, H, D]", 3)
    check_float(_NAME, "q", q)
    check_rank(_NAME, "k_cache", k_cache, "[num_pages, P, Hkv, D]", 4)
    check_rank(_NAME, "block_tables", block_tables, "[B, max_pages]", 2)
    device = q.device
    _, num_heads, head_dim = q.shape
    num_pages, page_size, num_kv_heads, _ = k_cache.shape
    cache_shape = (num_pages, page_size, num_kv_heads, head_dim)
    check_tensor(_NAME, "k_cache", k_cache, cache_shape, (q.dtype,), device)
    check_tensor(_NAME, "v_cache", v_cache, cache_shape, (q.dtype,), device)
    if num_kv_heads == 0:
        bad_value(_NAME, "k_cache", "at least one KV head", f"shape {cache_shape}")
    if num_heads == 0 or num_heads % num_kv_heads:
        expected = f"at least one head, a multiple of Hkv = {num_kv_heads}"
        bad_value(_NAME, "q", expected, f"H = {num_heads}")
    batch, max_pages = block_tables.shape
    check_tensor(_NAME, "block_tables", block_tables, (batch, max_pages), INDEX_DTYPES, device)
    check_tensor(_NAME, "kv_lens", kv_lens, (batch,), INDEX_DTYPES, device)
    check_tensor(_NAME, "q_indptr", q_indptr, (batch + 1,), INDEX_DTYPES, device)
    if window < 0:
        bad_value(_NAME, "window", "0 (unlimited) or a positive number", repr(window))
    return q, k_cache, v_cache, block_tables, kv_lens, q_indptr, scale, window, backend


def _prepare_bwd(dout: Tensor, *inputs: Any) -> tuple[Any, ...]:
    """The gradient operator is only ever called with inputs the forward has checked."""
    return (dout, *inputs, "auto")


def _fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    q_indptr: Tensor,
    scale: float,
    window: int,
    backend: str,
) -> Tensor:
    return q.new_empty(q.shape)


def _fake_bwd(
    dout: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    q_indptr: Tensor,
    scale: float,
    window: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k_cache.new_empty(k_cache.shape), v_cache.new_empty(v_cache.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.scale, ctx.window = inputs[6:8]


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    # An operator of its own: its loop over requests reads lengths, which a tracer cannot.
    grads = _OP_BWD(*_prepare_bwd(dout, *ctx.saved_tensors, ctx.scale, ctx.window))
    needed = [g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True)]
    return (*needed, None, None, None, None, None, None)


_OP = Op(
    _NAME,
    f"({_INPUTS}) -> Tensor",
    prepare=_prepare,
    backends=(
        Backend("native", paged_attention_native, cannot_native, records=True),
        triton_backend("fssa_kernels.ops.paged_attention.triton_impl", "paged_attention_triton"),
        cuda_backend("fssa_kernels.ops.paged_attention.cuda_impl", "paged_attention_cuda"),
        Backend("sdpa", paged_attention_sdpa, avoid=avoid_sdpa),
        Backend("reference", paged_attention_ref),
    ),
    fake=_fake,
    save=_save,
    backward=_backward,
)
_OP_BWD = Op(
    f"{_NAME}_bwd",
    f"(Tensor dout, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    prepare=_prepare_bwd,
    backends=(Backend("reference", paged_attention_bwd_ref),),
    fake=_fake_bwd,
)
