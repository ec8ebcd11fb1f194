"""Residual add, FiLM and RMS norm on the CPU in C++ (csrc/cpu/residual_film_rms_norm.h)."""

from torch import Tensor

from fssa_kernels.native import (
    DTYPE_CODES,
    NATIVE,
    address,
    empty,
    launch,
    rows_of,
    unsupported,
)


def cannot_native(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    rows: Tensor | None,
    slots: Tensor | None,
    lora_a: Tensor | None,
    gates: Tensor | None,
    eps: float,
    weight_offset: float,
) -> str | None:
    """Why the native kernel is unable to serve these inputs, or None."""
    if lora_a is not None:
        return "the kernel has no product with lora_a"
    reason = unsupported(x=x, residual=residual, weight=weight, rows=rows, slots=slots)
    if reason is None and rows is not None and not rows[:1].is_contiguous():
        return f"one slot's part of rows is not contiguous (strides {rows.stride()})"
    return reason


def residual_film_rms_norm_native(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    rows: Tensor | None,
    slots: Tensor | None,
    lora_a: Tensor | None,
    gates: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    """The public function on inputs that `cannot_native` accepts; ValueError for a bad slot."""
    assert NATIVE is not None
    num_tokens, num_channels = x.shape
    normed = empty(x, (num_tokens, num_channels), x.dtype, apart=True)
    h = empty(x, (num_tokens, num_channels), x.dtype, apart=True, own=True)
    call = NATIVE.residual_film_rms_norm(
        rows_of(x),
        normed.data_ptr(),
        h.data_ptr(),
        h.stride(0),
        x.data_ptr(),
        x.stride(0),
        address(residual),
        0 if residual is None else residual.stride(0),
        DTYPE_CODES[x.dtype],
        weight.data_ptr(),
        DTYPE_CODES[weight.dtype],
        address(rows),
        0 if rows is None else DTYPE_CODES[rows.dtype],
        0 if rows is None else rows.stride(0),
        address(slots),
        0 if rows is None else rows.shape[0],
        num_channels,
        eps,
        weight_offset,
    )
    launch("residual_film_rms_norm", call, x, residual, weight, rows, slots)
    return normed, h
