"""PyTorch maths of taking rows."""

from torch import Tensor

from fssa_kernels.checks import pick
from fssa_kernels.packed import PackedMatrix, unpacked


def take_rows_ref(table: Tensor | PackedMatrix, index: Tensor, scale: float) -> Tensor:
    """scale * table[index], rounded once."""
    rows = pick("take_rows", "index", unpacked(table), index)
    return rows if scale == 1.0 else rows * scale
