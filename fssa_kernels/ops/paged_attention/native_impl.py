"""Paged attention on the CPU in C++ (csrc/cpu/paged_attention.h)."""

import torch
from torch import Tensor

from fssa_kernels.native import (
    DTYPE_CODES,
    NATIVE,
    empty,
    launch,
    rows_of,
    unsupported,
)


def cannot_native(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    q_indptr: Tensor,
    scale: float,
    window: int,
) -> str | None:
    """Why the native kernel is unable to serve these inputs, or None."""
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not tensor.is_contiguous():
            return f"{name} is not contiguous (strides {tensor.stride()})"
    return unsupported(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        block_tables=block_tables,
        kv_lens=kv_lens,
        q_indptr=q_indptr,
    )


def paged_attention_native(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    q_indptr: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """The public function on inputs that `cannot_native` accepts; ValueError for bad lengths."""
    assert NATIVE is not None
    num_tokens, num_heads, head_dim = q.shape
    num_pages, page_size, num_kv_heads, _ = k_cache.shape
    out = empty(q, (num_tokens, num_heads, head_dim), q.dtype, apart=True)
    max_pages, num_threads = block_tables.shape[1], torch.get_num_threads()
    per_thread = NATIVE.attention_scratch(num_heads, head_dim, max_pages * page_size)
    scratch = empty(q, (num_threads, per_thread), torch.float32, own=True)
    call = NATIVE.paged_attention(
        rows_of(q),
        rows_of(kv_lens),
        out.data_ptr(),
        out.stride(0),
        (q.data_ptr(), q.stride(0), q.stride(1)),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        DTYPE_CODES[q.dtype],
        block_tables.data_ptr(),
        block_tables.stride(0),
        kv_lens.data_ptr(),
        q_indptr.data_ptr(),
        num_pages,
        page_size,
        max_pages,
        num_heads,
        num_kv_heads,
        head_dim,
        scale,
        window,
        scratch.data_ptr(),
        num_threads,
    )
    launch("paged_attention", call, q, k_cache, v_cache, block_tables, kv_lens, q_indptr, scratch)
    return out
