"""Rotary positions and the cache write on the CPU in C++ (csrc/cpu/rope_kv_write.h)."""

from torch import Tensor

from fssa_kernels.native import DTYPE_CODES, NATIVE, address, empty, launch, rows_of, unsupported


def cannot_native(
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
) -> str | None:
    """Why the native kernel is unable to serve these inputs, or None."""
    for name, tensor in (("cos_sin", cos_sin), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not tensor.is_contiguous():
            return f"{name} is not contiguous (strides {tensor.stride()})"
    normed = q_norm is not None or k_norm is not None
    if NATIVE is not None and normed and q.shape[2] > NATIVE.MAX_NORMED_HEAD:
        return f"D is {q.shape[2]}, the kernel normalises heads of up to {NATIVE.MAX_NORMED_HEAD}"
    return unsupported(
        q=q,
        k=k,
        v=v,
        positions=positions,
        cos_sin=cos_sin,
        k_cache=k_cache,
        v_cache=v_cache,
        kv_slots=kv_slots,
        q_norm=q_norm,
        k_norm=k_norm,
    )


def rope_kv_write_native(
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
) -> Tensor:
    """The public function on inputs that `cannot_native` accepts; ValueError for a bad index."""
    assert NATIVE is not None
    num_tokens, num_heads, head_dim = q.shape
    num_pages, page_size, num_kv_heads, _ = k_cache.shape
    rotated = empty(q, (num_tokens, num_heads, head_dim), q.dtype, own=True)
    call = NATIVE.rope_kv_write(
        rows_of(q),
        rotated.data_ptr(),
        _heads(q),
        _heads(k),
        _heads(v),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        DTYPE_CODES[q.dtype],
        cos_sin.data_ptr(),
        positions.data_ptr(),
        kv_slots.data_ptr(),
        num_heads,
        num_kv_heads,
        head_dim,
        cos_sin.shape[1],
        cos_sin.shape[0],
        num_pages * page_size,
        address(q_norm),
        0 if q_norm is None else DTYPE_CODES[q_norm.dtype],
        address(k_norm),
        0 if k_norm is None else DTYPE_CODES[k_norm.dtype],
        eps,
        weight_offset,
    )
    kept = (positions, cos_sin, k_cache, v_cache, kv_slots, q_norm, k_norm)
    launch("rope_kv_write", call, q, k, v, *kept)
    return rotated


def _heads(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)
