"""Device code of the modulated linear.

`modulated_linear_kernel` is the whole op in one launch: each program streams its tile of W once
and, with the same tile of x, accumulates x W^T and the low-rank input u = x A^T; at the end u is
modulated by each row's user and its product with B goes into the same accumulator. A is read from
the L2 cache, of a user only R numbers (R^2 for core). The term is linear in x, so programs that
share a tile along K each add their own part of it. `expand_kernel` adds the term to a product that
the vendor's library has made.
"""

import triton
import triton.language as tl

from fssa_kernels.ops.modulated_linear.triton_low_rank import low_rank_product, modulated


@triton.jit
def activate(gate, up, EPILOGUE: tl.constexpr):
    """act(gate) * up in fp32."""
    if EPILOGUE == "silu_mul":
        act = gate * tl.sigmoid(gate)
    else:
        # tanh(z) = 2 sigmoid(2z) - 1
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        act = gate * tl.sigmoid(2.0 * inner)
    return act * up


@triton.jit
def tile_of(
    pid,
    num_tiles_t,
    num_tiles_n,
    end_0,
    end_1,
    end_2,
    end_3,
    S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(row tile, projection, its first column, its end, tile in it) of a program.

    Programs that run at the same time work on few column tiles of many rows, so that W comes from
    memory once; a tile never straddles two projections, so that it needs one projection's u only.
    """
    GROUP: tl.constexpr = 8
    group = pid // (GROUP * num_tiles_n)
    rows_in_group = min(num_tiles_t - group * GROUP, GROUP)
    within = pid % (GROUP * num_tiles_n)
    tile_t = group * GROUP + within % rows_in_group
    tile_n = within // rows_in_group
    s = 0
    start = 0
    end = end_0
    first = 0
    if S > 1:
        boundary = tl.cdiv(end_0, BLOCK_N)
        past = tile_n >= boundary
        s = past.to(tl.int32)
        start = tl.where(past, end_0, 0)
        end = tl.where(past, end_1, end_0)
        first = tl.where(past, boundary, 0)
        if S > 2:
            boundary += tl.cdiv(end_1 - end_0, BLOCK_N)
            past = tile_n >= boundary
            s += past.to(tl.int32)
            start = tl.where(past, end_1, start)
            end = tl.where(past, end_2, end)
            first = tl.where(past, boundary, first)
            if S > 3:
                boundary += tl.cdiv(end_2 - end_1, BLOCK_N)
                past = tile_n >= boundary
                s += past.to(tl.int32)
                start = tl.where(past, end_2, start)
                end = tl.where(past, end_3, end)
                first = tl.where(past, boundary, first)
    return tile_t, s, start, end, tile_n - first


@triton.jit
def finish(y_ptr, bias_ptr, acc, acc_up, here, mask, n, n_mask, half, EPILOGUE: tl.constexpr):
    """Bias, epilogue, one rounding, store."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE != "none":
        if bias_ptr is not None:
            bias_up = tl.load(bias_ptr + half + n, mask=n_mask, other=0.0)
            acc_up += bias_up.to(tl.float32)[None, :]
        acc = activate(acc, acc_up, EPILOGUE)
    tl.store(y_ptr + here, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_users", "num_tiles_t"])
def modulated_linear_kernel(
    y_ptr,
    partial_ptr,
    counter_ptr,
    x_ptr,
    weight_ptr,
    weight_up_ptr,
    bias_ptr,
    lora_a_ptr,
    lora_b_ptr,
    rows_ptr,
    slots_ptr,
    low_ptr,
    num_tokens,
    in_features,
    out_columns,
    rank,
    num_users,
    end_0,
    end_1,
    end_2,
    end_3,
    num_tiles_t,
    num_tiles_n,
    stride_x,
    stride_w,
    stride_a,
    stride_b,
    stride_b_user,
    stride_u,
    stride_low,
    FAMILY: tl.constexpr,
    LOW: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    S: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    PAIRED: tl.constexpr = EPILOGUE != "none"
    PROJECTIONS: tl.constexpr = 1 if PAIRED else S
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tile_t, s, start, end, tile_n = tile_of(
        tile, num_tiles_t, num_tiles_n, end_0, end_1, end_2, end_3, PROJECTIONS, BLOCK_N
    )
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    n = start + tile_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    t_mask = t < num_tokens
    n_mask = n < end
    # Rows and columns past the end repeat one that exists: no mask in the loop.
    x_ptrs = x_ptr + tl.where(t_mask, t, 0)[:, None] * stride_x + k[None, :]
    w_at = tl.where(n_mask, n, start)[:, None] * stride_w + k[None, :]
    w_ptrs = weight_ptr + w_at
    w_up_ptrs = w_ptrs
    if PAIRED:
        w_up_ptrs = weight_up_ptr + w_at
    a_rows = s * rank + tl.where(r < rank, r, 0)
    a_ptrs = lora_a_ptr
    if LOW == "loop":
        a_ptrs = lora_a_ptr + a_rows[:, None] * stride_a + k[None, :]
    # Swapped, W stands on the side of the instruction that is 64 wide and x on the side that may
    # be 8: few rows then waste little of it, and W goes to it without passing through registers.
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        u = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
    else:
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        u = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    acc_up = acc
    u_up = u
    chunk = tl.cdiv(tl.cdiv(in_features, BLOCK_K), SPLIT_K) * BLOCK_K
    first = split * chunk
    last = min(first + chunk, in_features)
    for k0 in range(first, last, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs + k0)
            w = tl.load(w_ptrs + k0)
        else:
            inside = (k0 + k < in_features)[None, :]
            x = tl.load(x_ptrs + k0, mask=inside, other=0.0)
            w = tl.load(w_ptrs + k0, mask=inside, other=0.0)
        if SWAP:
            acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        if PAIRED:
            if EVEN_K:
                w_up = tl.load(w_up_ptrs + k0)
            else:
                inside = (k0 + k < in_features)[None, :]
                w_up = tl.load(w_up_ptrs + k0, mask=inside, other=0.0)
            if SWAP:
                acc_up = tl.dot(w_up, tl.trans(x), acc_up, input_precision=PRECISION)
            else:
                acc_up = tl.dot(x, tl.trans(w_up), acc_up, input_precision=PRECISION)
        if LOW == "loop":
            if EVEN_K:
                a = tl.load(a_ptrs + k0).to(x.dtype)
            else:
                inside = (k0 + k < in_features)[None, :]
                a = tl.load(a_ptrs + k0, mask=inside, other=0.0).to(x.dtype)
            if SWAP:
                u = tl.dot(a, tl.trans(x), u, input_precision=PRECISION)
            else:
                u = tl.dot(x, tl.trans(a), u, input_precision=PRECISION)
            if PAIRED:
                if EVEN_K:
                    a_up = tl.load(a_ptrs + rank * stride_a + k0).to(x.dtype)
                else:
                    inside = (k0 + k < in_features)[None, :]
                    a_up = tl.load(a_ptrs + rank * stride_a + k0, mask=inside, other=0.0)
                    a_up = a_up.to(x.dtype)
                if SWAP:
                    u_up = tl.dot(a_up, tl.trans(x), u_up, input_precision=PRECISION)
                else:
                    u_up = tl.dot(x, tl.trans(a_up), u_up, input_precision=PRECISION)
    if SWAP:
        acc = tl.trans(acc)
        u = tl.trans(u)
        if PAIRED:
            acc_up = tl.trans(acc_up)
            u_up = tl.trans(u_up)
    if LOW == "loop":
        slot = tl.zeros((BLOCK_T,), tl.int32)
        if slots_ptr is not None:
            slot = tl.load(slots_ptr + t, mask=t_mask, other=0)
        u = tl.where((r < rank)[None, :], u, 0.0)
        u = modulated(u, rows_ptr, slot, t_mask, s, rank, num_users, stride_u, FAMILY, BLOCK_R)
        if PAIRED:
            u_up = tl.where((r < rank)[None, :], u_up, 0.0)
            u_up = modulated(
                u_up, rows_ptr, slot, t_mask, 1, rank, num_users, stride_u, FAMILY, BLOCK_R
            )
    if LOW != "none":
        acc = low_rank_product(
            acc, u, lora_b_ptr, low_ptr, slots_ptr, t, t_mask, n, n_mask, s, split, rank,
            num_users, stride_low, stride_b, stride_b_user, FAMILY, LOW, LOW_PRECISION, BLOCK_T,
            BLOCK_R,
        )  # fmt: skip
        if PAIRED:
            acc_up = low_rank_product(
                acc_up, u_up, lora_b_ptr, low_ptr, slots_ptr, t, t_mask, end_0 + n, n_mask, 1,
                split, rank, num_users, stride_low, stride_b, stride_b_user, FAMILY, LOW,
                LOW_PRECISION, BLOCK_T, BLOCK_R,
            )  # fmt: skip
    here = t[:, None] * out_columns + n[None, :]
    mask = t_mask[:, None] & n_mask[None, :]
    if SPLIT_K == 1:
        finish(y_ptr, bias_ptr, acc, acc_up, here, mask, n, n_mask, end_0, EPILOGUE)
    else:
        # Every program leaves its part; the last one to come adds them up, in the order of K
        # whatever the order of arrival.
        PARTS: tl.constexpr = 2 if PAIRED else 1
        size = num_tokens.to(tl.int64) * out_columns
        parts = partial_ptr + here
        tl.store(parts + split * PARTS * size, acc, mask=mask)
        if PAIRED:
            tl.store(parts + (split * PARTS + 1) * size, acc_up, mask=mask)
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLIT_K - 1:
            total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            total_up = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            for part in range(SPLIT_K):
                at = parts + part * PARTS * size
                total += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
                if PAIRED:
                    total_up += tl.load(at + size, mask=mask, other=0.0, cache_modifier=".cg")
            finish(y_ptr, bias_ptr, total, total_up, here, mask, n, n_mask, end_0, EPILOGUE)
            tl.store(counter_ptr + tile, 0)


@triton.jit(do_not_specialize=["num_tokens", "num_users", "num_tiles_t"])
def expand_kernel(
    y_ptr,
    base_ptr,
    low_ptr,
    lora_b_ptr,
    slots_ptr,
    num_tokens,
    out_columns,
    rank,
    num_users,
    end_0,
    end_1,
    end_2,
    end_3,
    num_tiles_t,
    num_tiles_n,
    stride_base,
    stride_low,
    stride_b,
    stride_b_user,
    FAMILY: tl.constexpr,
    LOW: tl.constexpr,
    EPILOGUE: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y = epilogue(base + low B^T), base [T, N] the vendor's x W^T + b."""
    PAIRED: tl.constexpr = EPILOGUE != "none"
    PROJECTIONS: tl.constexpr = 1 if PAIRED else S
    tile_t, s, start, end, tile_n = tile_of(
        tl.program_id(0), num_tiles_t, num_tiles_n, end_0, end_1, end_2, end_3, PROJECTIONS, BLOCK_N
    )
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    n = start + tile_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    t_mask = t < num_tokens
    n_mask = n < end
    mask = t_mask[:, None] & n_mask[None, :]
    at = base_ptr + t[:, None] * stride_base + n[None, :]
    acc = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if LOW == "given":
        u = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        acc = low_rank_product(
            acc, u, lora_b_ptr, low_ptr, slots_ptr, t, t_mask, n, n_mask, s, 0, rank,
            num_users, stride_low, stride_b, stride_b_user, FAMILY, LOW, LOW_PRECISION, BLOCK_T,
            BLOCK_R,
        )  # fmt: skip
    if PAIRED:
        up = tl.load(at + end_0, mask=mask, other=0.0).to(tl.float32)
        if LOW == "given":
            u = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
            up = low_rank_product(
                up, u, lora_b_ptr, low_ptr, slots_ptr, t, t_mask, end_0 + n, n_mask, 1, 0,
                rank, num_users, stride_low, stride_b, stride_b_user, FAMILY, LOW, LOW_PRECISION,
                BLOCK_T, BLOCK_R,
            )  # fmt: skip
        acc = activate(acc, up, EPILOGUE)
    here = t[:, None] * out_columns + n[None, :]
    tl.store(y_ptr + here, acc.to(y_ptr.dtype.element_ty), mask=mask)
