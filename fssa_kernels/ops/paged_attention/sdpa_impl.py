"""Attention over a paged KV cache by torch's fused kernel, where ours cannot run on a GPU.

Like the reference it takes one request after another, which needs the lengths on the host: the call
waits for the GPU, and no CUDA graph can hold it. Unlike the reference it need not hold the scores
of all queries and keys at once, where torch has a fused kernel for the request.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fssa_kernels.ops.paged_attention.reference import _gather, _hidden, _parts


def avoid_sdpa(q: Tensor, *_inputs: object) -> str | None:
    """Why `auto` prefers the reference, or None."""
    return "it is the fallback on a GPU" if q.device.type == "cpu" else None


def paged_attention_sdpa(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    q_indptr: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """The public function, each request by itself; products in q.dtype, sums in fp32."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for part in _parts(q, k_cache, block_tables, kv_lens, q_indptr, window):
        queries, k, v = (
            rows.transpose(0, 1).unsqueeze(0)
            for rows in (q[part.rows], _gather(k_cache, part), _gather(v_cache, part))
        )
        whole = part.first_query == 0 and not window
        alone = part.kv_len - part.first_query == 1 and not window
        mixed = F.scaled_dot_product_attention(
            queries,
            k,
            v,
            attn_mask=None if whole or alone else ~_hidden(part, window, q.device),
            is_causal=whole,
            scale=scale,
            enable_gqa=q.shape[1] != k_cache.shape[2],
        )
        out[part.rows] = mixed[0].transpose(0, 1)
    return out
