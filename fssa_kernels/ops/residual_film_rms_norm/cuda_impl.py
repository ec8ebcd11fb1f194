"""Residual add, FiLM and RMS norm by CUDA C++ kernels (csrc/cuda/residual_film_rms_norm.*)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fssa_kernels.cuda.backend import is_aligned, refusal, unsupported
from fssa_kernels.cuda.module import (
    DTYPE_CODES,
    address,
    cuda_module,
    is_float32,
    limits,
    on_device_of,
    stream_of,
)


def _plan(x: Tensor, lora_a: Tensor | None) -> Any:
    module = cuda_module()
    assert module is not None
    return module.residual_film_rms_norm_plan(
        device=limits(x),
        num_tokens=x.shape[0],
        num_channels=x.shape[1],
        low_rank=0 if lora_a is None else lora_a.shape[0],
    )


def cannot_cuda(
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
    """Why the kernels are unable to serve these inputs, or None."""
    reason = unsupported(
        {"x": x, "residual": residual, "lora_a": lora_a},
        {"weight": weight, "rows": rows, "slots": slots, "gates": gates},
    )
    if reason is not None:
        return reason
    if rows is not None and not rows[:1].is_contiguous():
        return f"one slot's part of rows is not contiguous (strides {rows.stride()})"
    try:
        _plan(x, lora_a)
    except ValueError as error:
        return refusal("residual_film_rms_norm", error)
    return None


def residual_film_rms_norm_cuda(
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
    """The public function on inputs that `cannot_cuda` accepts; NaN for a slot out of range."""
    num_tokens, num_channels = x.shape
    low_rank = 0 if lora_a is None else lora_a.shape[0]
    normed = x.new_empty(num_tokens, num_channels + low_rank)
    h = x.new_empty(num_tokens, num_channels)
    if not num_tokens:
        return normed, h
    module = cuda_module()
    assert module is not None
    with on_device_of(x):
        module.residual_film_rms_norm(
            plan=_plan(x, lora_a),
            stream=stream_of(x),
            dtype=DTYPE_CODES[x.dtype],
            normed=normed.data_ptr(),
            stride_normed=normed.stride(0),
            h=h.data_ptr(),
            x=x.data_ptr(),
            stride_x=x.stride(0),
            residual=address(residual),
            stride_residual=0 if residual is None else residual.stride(0),
            weight=_vector(weight),
            film=_vector(rows),
            lora_a=address(lora_a),
            stride_a=0 if lora_a is None else lora_a.stride(0),
            gates=_vector(gates),
            slots=address(slots),
            num_tokens=num_tokens,
            num_channels=num_channels,
            low_rank=low_rank,
            num_users=0 if rows is None else rows.shape[0],
            num_gates=0 if gates is None else gates.shape[0],
            eps=eps,
            weight_offset=weight_offset,
        )
    return normed, h


def _vector(tensor: Tensor | None) -> tuple[int, int, bool, bool]:
    """(address, row stride, whether it is fp32, whether 16 bytes of it can be read at once)."""
    if tensor is None:
        return 0, 0, False, False
    return tensor.data_ptr(), tensor.stride(0), is_float32(tensor), is_aligned(tensor)
