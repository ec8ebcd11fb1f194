"""Paged attention on a GPU: decode, prefill and any mixture of them by one kernel.

A program takes a tile of queries of one request, for all the heads that share a KV head. Keys are
walked in blocks and, a level above, in splits of KEYS_PER_SPLIT positions, both counted from
position 0 of the request. Every split has an online softmax of its own, and the splits of a row
are merged one after another. Where few programs would leave the GPU idle (decode), the splits are
shared out among several programs, which leave them in scratch memory for a second kernel to merge;
else the program merges its splits itself. That is a matter of scheduling only: both ways do the
same operations in the same order.

So the bits of a row depend on its query and on the keys it sees, not on the other rows of its tile,
on the batch, on how the prompt was cut into chunks, nor on how many programs shared the work: a
block or a split of which the row sees nothing changes nothing in it. This is why decode runs on the
same tile as prefill, although most of it is empty then: another height may take another matrix
instruction, which rounds otherwise. Tiles are chosen from dtype and sizes of heads alone, but what
the instruction does with them belongs to the GPU: two generations of GPUs may differ in the last
bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fssa_kernels.gpu.backend import unsupported
from fssa_kernels.gpu.launch import facts, launch

# Positions that one online softmax covers: a multiple of every block of keys. Not measured.
KEYS_PER_SPLIT = 256
MAX_HEAD_DIM = 256
# Heads of one KV head are rows of one tile.
MAX_GROUP = 64
# In fp32, of heads wider than 128: more would spill, and take too much of some GPUs' shared memory.
MAX_WIDE_GROUP = 32
# Programs wanted for each multiprocessor before splits stay within a program, and the scratch
# memory that sharing them out may take. Not measured.
PROGRAMS_PER_SM = 4
MAX_SCRATCH_BYTES = 256 << 20

_ALL = 2**31 - 1  # as a window, every position


@triton.jit
def find_kernel_part(
    q_indptr_ptr,
    kv_lens_ptr,
    place,
    batch,
    num_tokens,
    max_keys,
    UNIT: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """What stands at a place: (request, its first place, its rows from .. to, kv_len, all fits).

    Request b begins at place q_indptr[b] // UNIT + b * STEP. Rows of no request count as a request
    number `batch` of no keys; if the bounds do not rise from 0 to at most num_tokens, all rows do.
    """
    request = -1
    num_faults = 0
    for first in range(0, batch + 1, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        start = tl.load(q_indptr_ptr + b, mask=b <= batch, other=num_tokens)
        begun = (start // UNIT + b * STEP <= place) & (b <= batch)
        request += tl.sum(begun.to(tl.int32), 0)
        before = tl.load(q_indptr_ptr + b - 1, mask=(b > 0) & (b <= batch), other=0)
        fault = (start < before) | (start > num_tokens) | ((b == 0) & (start != 0))
        num_faults += tl.sum(fault.to(tl.int32), 0)
    sound = num_faults == 0
    # A faulty scan may have found anything.
    request = tl.where(sound, request, batch)
    known = request < batch
    start = tl.load(q_indptr_ptr + request)
    start = tl.where(sound, start, 0)
    first_place = tl.where(sound, start // UNIT + request * STEP, 0)
    stop = tl.load(q_indptr_ptr + request + 1, mask=known, other=num_tokens)
    kv_len = tl.load(kv_lens_ptr + request, mask=known, other=0)
    fits = known & (stop - start <= kv_len) & (kv_len <= max_keys)
    fits = sound & (fits | (request == batch))
    return request, first_place, start, stop, kv_len, fits


@triton.jit
def merge_kernel_part(peak, total, out, peak_s, total_s, out_s):
    """Merge one more split into a row's sums: exactly nothing happens if the row saw none of it.

    The fused operations are spelled out, so that no compiler chooses them differently elsewhere.
    """
    top = tl.maximum(peak, peak_s)
    base = tl.where(top == float("-inf"), 0.0, top)
    old = tl.exp2(peak - base)
    new = tl.exp2(peak_s - base)
    total = tl.fma(total, old, total_s * new)
    out = tl.fma(out, tl.broadcast_to(old[:, None], out.shape), out_s * new[:, None])
    return top, total, out


@triton.jit
def split_kernel_part(
    q,
    k_ptr,
    v_ptr,
    table_ptr,
    position,
    first,
    last,
    begin,
    end,
    num_pages,
    stride_k_page,
    stride_k,
    stride_v_page,
    stride_v,
    log2_scale,
    window,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(largest score, sum of weights, weighted values) of a tile over the keys of one split.

    Scores are in powers of two. Only positions in [begin, end), which some row sees, are read.
    """
    d = tl.arange(0, BLOCK_D)[None, :]
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for block in range(first, last, BLOCK_K):
        j = block + tl.arange(0, BLOCK_K)
        wanted = (j >= begin) & (j < end)
        page = tl.load(table_ptr + j // PAGE_SIZE, mask=wanted, other=0)
        exists = (page >= 0) & (page < num_pages)
        page = page.to(tl.int64)
        mask = (wanted & exists)[:, None] & (d < D)
        k_at = (page * stride_k_page + (j % PAGE_SIZE) * stride_k)[:, None] + d
        k = tl.load(k_ptr + k_at, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * log2_scale
        scores = tl.where(exists[None, :], scores, float("nan"))
        seen = (j[None, :] <= position[:, None]) & (j[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(scores - base[:, None])
        old = tl.exp2(peak - base)
        total = tl.fma(total, old, tl.sum(weights, 1))
        # Of a weight of zero and what lies beyond the request, the product must be zero.
        v_at = k_at
        if stride_v_page is not None:
            v_at = (page * stride_v_page + (j % PAGE_SIZE) * stride_v)[:, None] + d
        v = tl.load(v_ptr + v_at, mask=mask, other=0.0)
        out = tl.dot(weights.to(v.dtype), v, out * old[:, None], input_precision=PRECISION)
        peak = top
    return peak, total, out


@triton.jit(do_not_specialize=["num_tokens", "batch"])
def paged_attention_kernel(
    out_ptr,
    partial_out_ptr,
    partial_peak_ptr,
    partial_total_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    block_tables_ptr,
    kv_lens_ptr,
    q_indptr_ptr,
    num_tokens,
    batch,
    num_pages,
    max_keys,
    num_heads,
    num_splits,
    num_parts,
    stride_q,
    stride_q_head,
    stride_k_page,
    stride_k,
    stride_k_head,
    stride_v_page,
    stride_v,
    stride_v_head,
    stride_table,
    log2_scale,
    window,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS_PER_SPLIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    request, first_tile, start, stop, kv_len, fits = find_kernel_part(
        q_indptr_ptr, kv_lens_ptr, tile, batch, num_tokens, max_keys, BLOCK_Q, 1, BLOCK_B
    )
    first_row = start + (tile - first_tile) * BLOCK_Q
    # Positions that the tile sees: none, if it lies past the request or nothing fits.
    stop_row = tl.minimum(first_row + BLOCK_Q, stop)
    attends = fits & (request < batch) & (first_row < stop)
    end = tl.where(attends, kv_len - stop + stop_row, 0)
    begin = tl.maximum(kv_len - stop + first_row - window + 1, 0)
    begin = tl.where(attends, begin, 0)

    r = tl.arange(0, BLOCK_M)
    t = first_row + r // GROUP
    in_tile = (r < BLOCK_Q * GROUP) & (t < stop)
    head = kv_head * GROUP + r % GROUP
    position = kv_len - stop + t
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = in_tile[:, None] & (d < D)
    q_at = (t.to(tl.int64) * stride_q + head.to(tl.int64) * stride_q_head)[:, None] + d
    q = tl.load(q_ptr + q_at, mask=mask, other=0.0)
    k_ptr += kv_head.to(tl.int64) * stride_k_head
    v_ptr += kv_head.to(tl.int64) * stride_v_head
    table_ptr = block_tables_ptr + request.to(tl.int64) * stride_table

    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for split in range(begin // KEYS_PER_SPLIT + part, tl.cdiv(end, KEYS_PER_SPLIT), num_parts):
        peak_s, total_s, out_s = split_kernel_part(
            q,
            k_ptr,
            v_ptr,
            table_ptr,
            position,
            tl.maximum(split * KEYS_PER_SPLIT, begin // BLOCK_K * BLOCK_K),
            tl.minimum((split + 1) * KEYS_PER_SPLIT, end),
            begin,
            end,
            num_pages,
            stride_k_page,
            stride_k,
            stride_v_page,
            stride_v,
            log2_scale,
            window,
            D,
            PAGE_SIZE,
            PRECISION,
            BLOCK_M,
            BLOCK_K,
            BLOCK_D,
        )
        if partial_out_ptr is None:
            peak, total, out = merge_kernel_part(peak, total, out, peak_s, total_s, out_s)
        else:
            # The launcher keeps the scratch memory small enough for 32 bits.
            row = (t * num_heads + head) * num_splits + split
            tl.store(partial_peak_ptr + row, peak_s, mask=in_tile)
            tl.store(partial_total_ptr + row, total_s, mask=in_tile)
            tl.store(partial_out_ptr + row[:, None] * D + d, out_s, mask=mask)
    if partial_out_ptr is None:
        nothing = tl.where(fits, 0.0, float("nan"))
        out = tl.where((total == 0.0)[:, None], nothing, out / total[:, None])
        at = out_ptr + (t.to(tl.int64) * num_heads + head)[:, None] * D + d
        tl.store(at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "batch"])
def merge_splits_kernel(
    out_ptr,
    partial_out_ptr,
    partial_peak_ptr,
    partial_total_ptr,
    kv_lens_ptr,
    q_indptr_ptr,
    num_tokens,
    batch,
    max_keys,
    num_heads,
    num_splits,
    window,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    KEYS_PER_SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    token = tl.program_id(0)
    request, _, _, stop, kv_len, fits = find_kernel_part(
        q_indptr_ptr, kv_lens_ptr, token, batch, num_tokens, max_keys, 1, 0, BLOCK_B
    )
    position = kv_len - stop + token
    attends = fits & (request < batch)
    begin = tl.where(attends, tl.maximum(position - window + 1, 0), 0) // KEYS_PER_SPLIT
    end = tl.where(attends, position // KEYS_PER_SPLIT + 1, 0)
    g = tl.arange(0, BLOCK_G)
    row = token.to(tl.int64) * num_heads + tl.program_id(1) * GROUP + g
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (g < GROUP)[:, None] & (d < D)
    peak = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    out = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for first in range(begin, end, BLOCK_S):
        # Unrolled, so that the loads of several splits are under way at once.
        for i in tl.static_range(BLOCK_S):
            at = row * num_splits + first + i
            # Blocks of one element: the interpreter mistypes masks joined with scalars.
            exists = (first + i + tl.arange(0, 1)) < end
            there = (g < GROUP) & exists
            peak_s = tl.load(partial_peak_ptr + at, mask=there, other=float("-inf"))
            total_s = tl.load(partial_total_ptr + at, mask=there, other=0.0)
            out_at = partial_out_ptr + at[:, None] * D + d
            out_s = tl.load(out_at, mask=mask & exists[:, None], other=0.0)
            peak, total, out = merge_kernel_part(peak, total, out, peak_s, total_s, out_s)
    nothing = tl.where(fits, 0.0, float("nan"))
    out = tl.where((total == 0.0)[:, None], nothing, out / total[:, None])
    tl.store(out_ptr + row[:, None] * D + d, out.to(out_ptr.dtype.element_ty), mask=mask)


def _tile(q: Tensor, group: int, block_d: int) -> tuple[int, int, int]:
    """(rows, keys of a block, warps), from the kind of GPU and the sizes of heads, not the batch.

    Rows are few enough for decode to wait for memory rather than for the products of rows that are
    not there; on a GPU without that instruction, prefill pays for it. What fits into registers was
    found by compiling; no time was measured.
    """
    capability = facts(q).capability
    if q.dtype == torch.float32:
        rows, keys, warps = 16, 16, 8
    elif block_d > 128:
        rows, keys, warps = 32, 32, 8
    elif 90 <= capability < 120:  # 64 rows are the least that a warp group's instruction takes
        rows, keys, warps = 64, 64 if block_d <= 64 else 32, 4 if capability < 100 else 8
    else:
        rows, keys, warps = 16, 64, 4
    if group > rows:
        rows, warps = triton.next_power_of_2(group), 8
    return rows, keys, warps


def cannot_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    q_indptr: Tensor,
    scale: float,
    window: int,
) -> str | None:
    """Why the kernels are unable to serve these inputs, or None."""
    head_dim = q.shape[2]
    if head_dim > MAX_HEAD_DIM:
        return f"heads are {head_dim} wide, the kernel takes at most {MAX_HEAD_DIM}"
    group = q.shape[1] // k_cache.shape[2]
    most = MAX_WIDE_GROUP if q.dtype == torch.float32 and head_dim > 128 else MAX_GROUP
    if group > most:
        return f"{group} heads share a KV head, the kernel takes at most {most} of these"
    return unsupported(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        block_tables=block_tables,
        kv_lens=kv_lens,
        q_indptr=q_indptr,
    )


def paged_attention_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    q_indptr: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """The public function on inputs that `cannot_triton` accepts; lengths are not read here.

    NaN for the rows of a request with more keys than its pages hold or fewer than queries, for
    rows that see a page that does not exist, and everywhere if q_indptr does not rise from 0 to at
    most T.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_pages, page_size, num_kv_heads, _ = k_cache.shape
    batch, max_pages = block_tables.shape
    out = q.new_empty(num_tokens, num_heads, head_dim)
    if not out.numel():
        return out
    group = num_heads // num_kv_heads
    block_d = max(16, triton.next_power_of_2(head_dim))
    device = facts(q)
    block_m, block_k, num_warps = _tile(q, group, block_d)
    block_q = block_m // group
    max_keys = max_pages * page_size
    num_splits = max(1, triton.cdiv(max_keys, KEYS_PER_SPLIT))
    # Request b begins at tile q_indptr[b] // block_q + b, rows of no request after the last.
    num_tiles = num_tokens // block_q + batch + 1
    num_parts = triton.cdiv(PROGRAMS_PER_SM * device.num_sms, num_tiles * num_kv_heads)
    num_parts = min(num_parts, num_splits)
    num_partials = num_tokens * num_heads * num_splits
    if num_partials * (head_dim + 2) * 4 > MAX_SCRATCH_BYTES:
        num_parts = 1
    partial_out = partial_peak = partial_total = None
    if num_parts > 1:
        partial_out = q.new_empty(num_partials, head_dim, dtype=torch.float32)
        partial_peak = q.new_empty(num_partials, dtype=torch.float32)
        partial_total = q.new_empty(num_partials, dtype=torch.float32)
    shared = {
        "out_ptr": out,
        "partial_out_ptr": partial_out,
        "partial_peak_ptr": partial_peak,
        "partial_total_ptr": partial_total,
        "kv_lens_ptr": kv_lens,
        "q_indptr_ptr": q_indptr,
        "num_tokens": num_tokens,
        "batch": batch,
        "max_keys": max_keys,
        "num_heads": num_heads,
        "num_splits": num_splits,
        "window": min(window or _ALL, _ALL),
        "D": head_dim,
        "GROUP": group,
        "KEYS_PER_SPLIT": KEYS_PER_SPLIT,
        "BLOCK_D": block_d,
        "BLOCK_B": 128,
    }
    alike = k_cache.stride()[:2] == v_cache.stride()[:2]
    launch(
        paged_attention_kernel,
        (num_tiles, num_kv_heads, num_parts),
        {
            **shared,
            "q_ptr": q,
            "k_ptr": k_cache,
            "v_ptr": v_cache,
            "block_tables_ptr": block_tables,
            "num_pages": num_pages,
            "num_parts": num_parts,
            "stride_q": q.stride(0),
            "stride_q_head": q.stride(1),
            "stride_k_page": k_cache.stride(0),
            "stride_k": k_cache.stride(1),
            "stride_k_head": k_cache.stride(2),
            # Where both caches lie alike, one address serves for both, and costs fewer registers.
            "stride_v_page": None if alike else v_cache.stride(0),
            "stride_v": None if alike else v_cache.stride(1),
            "stride_v_head": v_cache.stride(2),
            "stride_table": block_tables.stride(0),
            "log2_scale": scale * 1.4426950408889634,
            "PAGE_SIZE": page_size,
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
            "BLOCK_Q": block_q,
            "BLOCK_M": block_m,
            "BLOCK_K": block_k,
        },
        num_warps=num_warps,
    )
    if num_parts > 1:
        block_g = triton.next_power_of_2(group)
        launch(
            merge_splits_kernel,
            (num_tokens, num_kv_heads),
            {**shared, "BLOCK_G": block_g, "BLOCK_S": 4},
            num_warps=max(1, min(4, block_g * block_d // 256)),
        )
    return out
