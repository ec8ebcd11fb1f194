"""The extended product: a modulated linear as one plain product over K + S*R columns.

    y = [x | s] [W | B]^T,    s = (x A^T) * g

For many rows, where a product is limited by arithmetic, this leaves it to the vendor's library and
adds (S*R)/K to its work; s comes from the norm before it (`residual_film_rms_norm` with `lora_a`),
which has x at hand. For few rows `modulated_linear` makes s itself on the way.
"""

from collections.abc import Sequence

from torch import Tensor

from fssa_kernels.checks import bad_type, bad_value, check_float, check_rank, check_tensor

# From this many rows on the extended product is worth it: reasoned (a product of so many rows is
# limited by arithmetic), not measured.
EXTENDED_FROM_ROWS = 257

# Triton copies 16 bytes at a time where a stride is known to be a multiple of 16 elements; 64 of
# them are a line of the GPU's cache in half precision.
_STRIDE_MULTIPLE = 64

_NAME = "extend_weight"


def extend_weight(weight: Tensor, lora_b: Tensor, splits: Sequence[int] | None = None) -> Tensor:
    """[W | B]: weight and, in the columns of each projection's s, its rows of lora_b.

    Arguments:
        weight: [N,K] floating. lora_b: [N,R], weight.dtype or fp32.
        splits: sizes of the stacked projections, sum N; None means one projection.

    Returns a fresh [N, K + S*R] in weight.dtype, zero where a projection does not use another's
    s; its rows are a multiple of 64 elements apart. ``result[:, :K]`` is the weight, a view that
    `modulated_linear` takes as well: so a model keeps one copy of it.

    Raises TypeError for a non-tensor or a wrong dtype, ValueError for wrong shapes or splits that
    do not sum to N.
    """
    for name, value in (("weight", weight), ("lora_b", lora_b)):
        if not isinstance(value, Tensor):
            bad_type(_NAME, name, "a tensor", type(value).__name__)
    check_rank(_NAME, "weight", weight, "[N, K]", 2)
    check_float(_NAME, "weight", weight)
    check_rank(_NAME, "lora_b", lora_b, "[N, R]", 2)
    num_columns, in_features = weight.shape
    rank = lora_b.shape[1]
    check_tensor(
        _NAME, "lora_b", lora_b, (num_columns, rank), (weight.dtype, lora_b.dtype), weight.device
    )
    sizes = [num_columns] if splits is None else list(splits)
    if sum(sizes) != num_columns:
        bad_value(_NAME, "splits", f"sizes that sum to N = {num_columns}", str(sizes))
    width = in_features + len(sizes) * rank
    stride = -(-width // _STRIDE_MULTIPLE) * _STRIDE_MULTIPLE
    extended = weight.new_zeros(num_columns, stride)[:, :width]
    extended[:, :in_features] = weight
    start = 0
    for s, size in enumerate(sizes):
        column = in_features + s * rank
        extended[start : start + size, column : column + rank] = lora_b[start : start + size]
        start += size
    return extended
