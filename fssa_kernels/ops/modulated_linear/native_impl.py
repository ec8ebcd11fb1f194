"""The modulated linear on the CPU in C++ (csrc/cpu/modulated_linear.cpp): support and packing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fssa_kernels.native import DTYPE_CODES, MISSING, NATIVE

# Family and Epilogue in csrc/cpu/modulated_linear.h.
_FAMILY_CODES = {"none": 0, "static": 1, "gated": 2, "core": 3, "factors": 4}
_EPILOGUE_CODES = {"none": 0, "silu_mul": 1, "gelu_tanh_mul": 2}

# Where the kernel stops being faster, by dtype and by whether torch may use several threads, and
# what it measured beyond: time of the reference divided by time of the kernel. Weights from memory,
# R = 8, K 576 and 1536, N 576 to 49152 (a 135M model's linears), AVX-512 with bf16 dot products,
# torch 2.13, one thread and two. At the limit itself: fp32 1.01-1.35 (4 rows, one thread) and
# 1.17-1.53 (12 rows, two); bf16 0.95-1.72 (1 row, one thread) and 0.97-1.57 (3 and 4 rows, two).
# Without a low-rank term torch runs one product and nothing else: bf16 0.98-1.39 at 1 row on two.
_SLOWER = {
    (torch.float32, False): (4, "0.81 to 1.10 of the reference's speed at 8 rows, one thread"),
    (torch.float32, True): (12, "0.76 to 1.18 of the reference's speed at 24 rows, two threads"),
    (torch.bfloat16, False): (1, "0.70 to 1.47 of the reference's speed at 2 rows, one thread"),
    (torch.bfloat16, True): (4, "0.57 to 0.97 of the reference's speed at 12 rows, two threads"),
}
_SLOWER_PLAIN_BFLOAT16 = (1, "0.68 to 0.97 of the reference's speed at 2 rows, two threads")


def cannot_native(
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
    """Why the native kernel is unable to serve these inputs, or None."""
    if NATIVE is None:
        return MISSING
    if x.device.type != "cpu":
        return f"x is on {x.device}, the kernel runs on the CPU"
    for name, tensor in (("x", x), ("lora_a", lora_a), ("lora_b", lora_b), ("rows", rows)):
        if tensor is not None and tensor.dtype not in DTYPE_CODES:
            return f"{name} is {tensor.dtype}, the kernel takes float32 and bfloat16"
    for name, tensor in (
        ("x", x),
        ("weight", weight),
        ("bias", bias),
        ("lora_a", lora_a),
        ("lora_b", lora_b),
        ("rows", rows),
        ("slots", slots),
    ):
        if tensor is not None and tensor.stride(-1) != 1 and not _is_trivial(tensor):
            return f"the last dimension of {name} is not contiguous (strides {tensor.stride()})"
    if family == "core" and rows is not None and not rows[:1].is_contiguous():
        return f"one slot's part of rows is not contiguous (strides {rows.stride()})"
    return None


def _is_trivial(tensor: Tensor) -> bool:
    """Whether the stride of the last dimension is never used: one element there, or none at all."""
    return tensor.shape[-1] == 1 or tensor.numel() == 0


def avoid_native(
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
    """Why `auto` prefers the reference on inputs the native kernel could serve, or None."""
    max_rows, measured = _SLOWER[x.dtype, torch.get_num_threads() > 1]
    if family == "none" and x.dtype == torch.bfloat16:
        max_rows, measured = _SLOWER_PLAIN_BFLOAT16
    return None if x.shape[0] <= max_rows else f"measured {measured}"


def modulated_linear_native(
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
    """The public function on inputs that `cannot_native` accepts; ValueError for a bad slot."""
    assert NATIVE is not None
    num_tokens, in_features = x.shape
    num_columns = weight.shape[0] if epilogue == "none" else weight.shape[0] // 2
    y = torch.empty(num_tokens, num_columns, dtype=x.dtype)
    num_users = 0
    if rows is not None:
        num_users = rows.shape[0]
    elif family == "factors" and lora_a is not None:
        num_users = lora_a.shape[0]
    NATIVE.modulated_linear(
        y.data_ptr(),
        x.data_ptr(),
        x.stride(0),
        DTYPE_CODES[x.dtype],
        weight.data_ptr(),
        weight.stride(0),
        bias.data_ptr() if bias is not None else 0,
        *_matrix(lora_a),
        *_matrix(lora_b),
        rows.data_ptr() if rows is not None else 0,
        rows.stride(0) if rows is not None else 0,
        DTYPE_CODES[rows.dtype] if rows is not None else 0,
        slots.data_ptr() if slots is not None else 0,
        num_tokens,
        in_features,
        lora_b.shape[-1] if lora_b is not None else 0,
        num_users,
        splits,
        _FAMILY_CODES[family],
        _EPILOGUE_CODES[epilogue],
        torch.get_num_threads(),
    )
    return y


def _matrix(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """Address, stride from user to user (0 where users share it), row stride, dtype code."""
    if tensor is None:
        return 0, 0, 0, 0
    user_stride = tensor.stride(0) if tensor.dim() == 3 else 0
    return tensor.data_ptr(), user_stride, tensor.stride(-2), DTYPE_CODES[tensor.dtype]
