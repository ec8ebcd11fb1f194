"""Device code of the low-rank term: u = x A^T as each row's user sees it, and its product with B.

The modulated linear makes u itself, beside its product with W. `shrink_kernel` and
`shrink_rows_kernel` make it beforehand where a program could not: factors, whose A differs from row
to row, and core with a large R.
"""

import triton
import triton.language as tl


@triton.jit
def modulated(
    u,
    rows_ptr,
    slot,
    t_mask,
    s,
    rank,
    num_users,
    stride_u,
    FAMILY: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """u [BLOCK_T, BLOCK_R] as each row's user sees it; NaN for a slot that is nobody's."""
    if FAMILY != "static":
        r = tl.arange(0, BLOCK_R)
        known = t_mask & (slot >= 0) & (slot < num_users)
        state = rows_ptr + slot.to(tl.int64) * stride_u
        if FAMILY == "gated":
            gates = tl.load(
                state[:, None] + s * rank + r[None, :],
                mask=known[:, None] & (r[None, :] < rank),
                other=float("nan"),
            )
            u = tl.where(r[None, :] < rank, u * gates.to(tl.float32), 0.0)
        else:
            # [BLOCK_T, i, j], u'_i = sum_j M_ij u_j
            inside = ((r[:, None] < rank) & (r[None, :] < rank))[None, :, :]
            core = tl.load(
                state[:, None, None]
                + s * rank * rank
                + (r[:, None] * rank + r[None, :])[None, :, :],
                mask=known[:, None, None] & inside,
                other=float("nan"),
            )
            core = tl.where(inside, core.to(tl.float32), 0.0)
            u = tl.sum(core * u[:, None, :], 2)
    return u


@triton.jit
def low_rank_product(
    acc,
    u,
    lora_b_ptr,
    low_ptr,
    slots_ptr,
    t,
    t_mask,
    n,
    n_mask,
    s,
    split,
    rank,
    num_users,
    stride_low,
    stride_b,
    stride_b_user,
    FAMILY: tl.constexpr,
    LOW: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc [BLOCK_T, BLOCK_N] + u B^T, B of projection s at columns n.

    A u made beforehand is added once, by the first of the programs that share the tile.
    """
    r = tl.arange(0, BLOCK_R)
    if LOW == "given":
        t_mask = t_mask & (tl.zeros_like(t) + split == 0)
        u = tl.load(
            low_ptr + t[:, None] * stride_low + s * rank + r[None, :],
            mask=t_mask[:, None] & (r[None, :] < rank),
            other=0.0,
        )
    if FAMILY == "factors":
        num_rows = tl.sum(t_mask.to(tl.int32), 0)
        first = tl.min(t, 0)
        for i in range(num_rows):
            row = first + i
            slot = tl.load(slots_ptr + row + tl.arange(0, 1))
            known = (slot >= 0) & (slot < num_users)
            mine = tl.load(low_ptr + row * stride_low + s * rank + r, mask=r < rank, other=0.0)
            # [BLOCK_N, BLOCK_R]
            b = tl.load(
                lora_b_ptr
                + slot[:, None].to(tl.int64) * stride_b_user
                + n[:, None] * stride_b
                + r[None, :],
                mask=known[:, None] & n_mask[:, None] & (r[None, :] < rank),
                other=float("nan"),
            )
            b = tl.where(r[None, :] < rank, b.to(tl.float32), 0.0)
            product = tl.sum(b * mine[None, :], 1)
            acc += tl.where((t == row)[:, None], product[None, :], 0.0)
    else:
        b = tl.load(
            lora_b_ptr + n[None, :] * stride_b + r[:, None],
            mask=n_mask[None, :] & (r[:, None] < rank),
            other=0.0,
        )
        acc = tl.dot(u, b.to(tl.float32), acc, input_precision=LOW_PRECISION)
    return acc


@triton.jit(do_not_specialize=["num_tokens", "num_users"])
def shrink_kernel(
    low_ptr,
    x_ptr,
    lora_a_ptr,
    rows_ptr,
    slots_ptr,
    num_tokens,
    in_features,
    rank,
    num_users,
    stride_low,
    stride_x,
    stride_a,
    stride_u,
    FAMILY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """low [T, S*R] = modulated x A^T in fp32; a program makes one projection of a block of rows."""
    s = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    t_mask = t < num_tokens
    u = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for k0 in range(0, in_features, BLOCK_K):
        inside = (k0 + k < in_features)[None, :]
        x = tl.load(
            x_ptr + t[:, None] * stride_x + (k0 + k)[None, :],
            mask=t_mask[:, None] & inside,
            other=0.0,
        )
        a = tl.load(
            lora_a_ptr + (s * rank + r)[:, None] * stride_a + (k0 + k)[None, :],
            mask=(r < rank)[:, None] & inside,
            other=0.0,
        )
        u = tl.dot(x, tl.trans(a.to(x.dtype)), u, input_precision=PRECISION)
    mask = t_mask[:, None] & (r < rank)[None, :]
    at = low_ptr + t[:, None] * stride_low + s * rank + r[None, :]
    slot = tl.zeros((BLOCK_T,), tl.int32)
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + t, mask=t_mask, other=0)
    if FAMILY == "core":
        # M is too large to keep for every row: u goes to memory, and comes back by columns.
        tl.store(at, u, mask=mask)
        tl.debug_barrier()
        known = t_mask & (slot >= 0) & (slot < num_users)
        state = rows_ptr + slot.to(tl.int64) * stride_u + s * rank * rank
        mixed = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for j in range(rank):
            column = tl.load(
                state[:, None] + r[None, :] * rank + j,
                mask=known[:, None] & (r < rank)[None, :],
                other=float("nan"),
            )
            u_j = tl.load(low_ptr + t * stride_low + s * rank + j, mask=t_mask, other=0.0)
            mixed += column.to(tl.float32) * u_j[:, None]
        tl.debug_barrier()
        tl.store(at, mixed, mask=mask)
    else:
        u = modulated(u, rows_ptr, slot, t_mask, s, rank, num_users, stride_u, FAMILY, BLOCK_R)
        tl.store(at, u, mask=mask)


@triton.jit(do_not_specialize=["num_users"])
def shrink_rows_kernel(
    low_ptr,
    x_ptr,
    lora_a_ptr,
    slots_ptr,
    in_features,
    rank,
    num_users,
    stride_low,
    stride_x,
    stride_a,
    stride_a_user,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """low[t] = A_u x_t of one projection in fp32, u the row's own user: one row a program."""
    t = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    slot = tl.load(slots_ptr + t + tl.arange(0, 1))
    known = (slot >= 0) & (slot < num_users)
    own = lora_a_ptr + slot[:, None].to(tl.int64) * stride_a_user
    u = tl.zeros((BLOCK_R,), tl.float32)
    for k0 in range(0, in_features, BLOCK_K):
        inside = k0 + k < in_features
        x = tl.load(x_ptr + t * stride_x + k0 + k, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(
            own + (s * rank + r)[:, None] * stride_a + (k0 + k)[None, :],
            mask=known[:, None] & (r < rank)[:, None] & inside[None, :],
            other=0.0,
        )
        u += tl.sum(a.to(tl.float32) * x[None, :], 1)
    u = tl.where(known, u, float("nan"))
    tl.store(low_ptr + t * stride_low + s * rank + r, u, mask=r < rank)
