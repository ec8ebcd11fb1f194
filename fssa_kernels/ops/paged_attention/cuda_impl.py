"""Attention of few queries over pages by a CUDA C++ kernel (csrc/cuda/paged_attention.*)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fssa_kernels.cuda.backend import refusal, unsupported
from fssa_kernels.cuda.module import (
    DTYPE_CODES,
    address,
    cuda_module,
    limits,
    on_device_of,
    stream_of,
)
from fssa_kernels.gpu.workspace import counters

_ALL = 2**31 - 1  # as a window, every position
_LOG2_E = 1.4426950408889634


def _plan(q: Tensor, k_cache: Tensor, block_tables: Tensor) -> Any:
    module = cuda_module()
    assert module is not None
    return module.paged_attention_plan(
        device=limits(q),
        num_tokens=q.shape[0],
        num_heads=q.shape[1],
        num_kv_heads=k_cache.shape[2],
        head_dim=q.shape[2],
        max_keys=block_tables.shape[1] * k_cache.shape[1],
    )


def cannot_cuda(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    q_indptr: Tensor,
    scale: float,
    window: int,
) -> str | None:
    """Why the kernel is unable to serve these inputs, or None."""
    reason = unsupported(
        {"q": q, "k_cache": k_cache, "v_cache": v_cache},
        {"block_tables": block_tables, "kv_lens": kv_lens, "q_indptr": q_indptr},
    )
    if reason is not None:
        return reason
    try:
        _plan(q, k_cache, block_tables)
    except ValueError as error:
        return refusal("paged_attention", error)
    return None


def paged_attention_cuda(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    q_indptr: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """The public function on inputs that `cannot_cuda` accepts; lengths are not read here.

    NaN where the public function says so of a GPU.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_pages, page_size, num_kv_heads, _ = k_cache.shape
    batch, max_pages = block_tables.shape
    out = q.new_empty(num_tokens, num_heads, head_dim)
    if not out.numel():
        return out
    plan = _plan(q, k_cache, block_tables)
    partial = counts = None
    if plan.num_parts > 1:
        partial = q.new_empty(plan.num_partials * (head_dim + 2), dtype=torch.float32)
        counts = counters(num_tokens * num_kv_heads, q.device)
    module = cuda_module()
    assert module is not None
    with on_device_of(q):
        module.paged_attention(
            plan=plan,
            stream=stream_of(q),
            dtype=DTYPE_CODES[q.dtype],
            result=out.data_ptr(),
            partial=address(partial),
            counters=address(counts),
            q=q.data_ptr(),
            stride_q=q.stride(0),
            stride_q_head=q.stride(1),
            k_cache=(k_cache.data_ptr(), *k_cache.stride()[:3]),
            v_cache=(v_cache.data_ptr(), *v_cache.stride()[:3]),
            block_tables=block_tables.data_ptr(),
            stride_table=block_tables.stride(0),
            kv_lens=kv_lens.data_ptr(),
            q_indptr=q_indptr.data_ptr(),
            num_tokens=num_tokens,
            batch=batch,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_pages=num_pages,
            page_size=page_size,
            max_keys=max_pages * page_size,
            window=min(window or _ALL, _ALL),
            log2_scale=scale * _LOG2_E,
        )
    return out
