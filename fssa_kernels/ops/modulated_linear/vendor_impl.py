"""The modulated linear by the vendor's matrix products in x.dtype: many rows of bf16 on a CPU.

The reference takes the low-rank term's products in fp32, and training spends much of its time on
them: thin products of matrices that have to be widened first. Here x, A, B and dy meet as bf16,
summed in fp32 inside a product; u and du are rounded between products, and what a user does to
them stays in fp32.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fssa_kernels.ops.modulated_linear.reference import add_shared, apply_epilogue
from fssa_kernels.packed import PackedMatrix

# Below, bf16 does not win what rounding A, B and u to it costs.
FROM_ROWS = 128


def cannot_vendor(
    x: Tensor,
    weight: Tensor | PackedMatrix,
    bias: Tensor | None,
    lora_a: Tensor | PackedMatrix | None,
    lora_b: Tensor | PackedMatrix | None,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: Sequence[int],
    epilogue: str,
) -> str | None:
    """Why these products cannot serve a call, or None."""
    if any(isinstance(matrix, PackedMatrix) for matrix in (weight, lora_a, lora_b)):
        return "only the native kernel reads packed matrices"
    return no_products(x, family)


def avoid_vendor(x: Tensor, *_inputs: object) -> str | None:
    """Why `auto` prefers the reference, or None; x is dy in the backward pass."""
    return f"fewer than {FROM_ROWS} rows" if x.shape[0] < FROM_ROWS else None


def no_products(x: Tensor, family: str) -> str | None:
    """Why a low-rank term of this family is not computed so, or None."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return f"x is {x.dtype} on {x.device.type}, and this is for bfloat16 on cpu"
    if family in ("none", "factors"):
        return f"family {family!r} has no low-rank term that all rows share"
    return None


def modulated_linear_vendor(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: Sequence[int],
    epilogue: str,
) -> Tensor:
    """The public function on inputs that `cannot_vendor` accepts."""
    y = F.linear(x, weight, bias)
    add_shared(y, x, lora_a, lora_b, rows, slots, family, splits, x.dtype)
    return apply_epilogue(y, epilogue)
