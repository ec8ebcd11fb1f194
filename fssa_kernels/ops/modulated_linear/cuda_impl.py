"""The modulated linear of few rows by CUDA C++ kernels (csrc/cuda/modulated_linear.*)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fssa_kernels.cuda.backend import refusal, unsupported
from fssa_kernels.cuda.module import (
    DTYPE_CODES,
    address,
    cuda_module,
    is_float32,
    limits,
    on_device_of,
    stream_of,
)
from fssa_kernels.gpu.workspace import counters

_FAMILIES = {"none": 0, "static": 1, "gated": 2, "core": 3, "factors": 4}
_EPILOGUES = {"none": 0, "silu_mul": 1, "gelu_tanh_mul": 2}


def _plan(x: Tensor, family: str, splits: Sequence[int], epilogue: str, rank: int) -> Any:
    """How the module launches a call; ValueError names the limit that is not kept."""
    module = cuda_module()
    assert module is not None
    return module.modulated_linear_plan(
        device=limits(x),
        num_tokens=x.shape[0],
        in_features=x.shape[1],
        splits=list(splits),
        paired=epilogue != "none",
        family=_FAMILIES[family],
        rank=rank,
    )


def cannot_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: Sequence[int],
    epilogue: str,
) -> str | None:
    """Why the kernels are unable to serve these inputs, or None."""
    reason = unsupported(
        {"x": x, "weight": weight, "lora_a": lora_a},
        {"bias": bias, "lora_b": lora_b, "rows": rows, "slots": slots},
    )
    if reason is not None:
        return reason
    if family == "core" and rows is not None and not rows[:1].is_contiguous():
        return f"one slot's part of rows is not contiguous (strides {rows.stride()})"
    if not x.shape[0]:
        return None
    try:
        _plan(x, family, splits, epilogue, 0 if lora_b is None else lora_b.shape[-1])
    except ValueError as error:
        return refusal("modulated_linear", error)
    return None


def modulated_linear_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: Sequence[int],
    epilogue: str,
) -> Tensor:
    """The public function on inputs that `cannot_cuda` accepts; NaN for a slot out of range."""
    num_tokens, in_features = x.shape
    y = x.new_empty(num_tokens, weight.shape[0] // (1 if epilogue == "none" else 2))
    if not num_tokens:
        return y
    rank = 0 if lora_b is None else lora_b.shape[-1]
    chosen = _plan(x, family, splits, epilogue, rank)
    if family == "factors":
        assert lora_b is not None
        num_users = lora_b.shape[0]
    else:
        num_users = 0 if rows is None else rows.shape[0]
    module = cuda_module()
    assert module is not None
    shared = {
        "stream": stream_of(x),
        "dtype": DTYPE_CODES[x.dtype],
        "x": x.data_ptr(),
        "stride_x": x.stride(0),
        "lora_a": address(lora_a),
        "stride_a": 0 if lora_a is None else lora_a.stride(-2),
        "rows": _side(rows),
        "slots": address(slots),
        "num_tokens": num_tokens,
        "in_features": in_features,
        "rank": rank,
        "num_users": num_users,
        "family": _FAMILIES[family],
    }
    partial = x.new_empty(chosen.partial_floats, dtype=torch.float32)
    low = None
    with on_device_of(x):
        if lora_a is not None and not chosen.in_loop:
            low = x.new_empty(num_tokens, len(splits) * rank, dtype=torch.float32)
            module.low_rank_input(
                **shared,
                low=low.data_ptr(),
                stride_low=low.stride(0),
                stride_a_user=lora_a.stride(0) if family == "factors" else 0,
                num_projections=len(splits),
            )
        module.modulated_linear(
            **shared,
            plan=chosen,
            y=y.data_ptr(),
            partial=partial.data_ptr(),
            counters=counters(chosen.num_tiles, x.device).data_ptr(),
            weight=weight.data_ptr(),
            stride_w=weight.stride(0),
            bias=address(bias),
            lora_b=_side(lora_b),
            low=address(low),
            stride_low=0 if low is None else low.stride(0),
            splits=list(splits),
            epilogue=_EPILOGUES[epilogue],
        )
    return y


def _side(tensor: Tensor | None) -> tuple[int, int, int, bool]:
    """(address, row stride, user stride, whether it is fp32)."""
    if tensor is None:
        return 0, 0, 0, False
    return tensor.data_ptr(), tensor.stride(-2), tensor.stride(0), is_float32(tensor)
