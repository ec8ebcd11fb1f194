"""Taking rows on the CPU in C++ (csrc/cpu/modulated_linear.h, which knows the packed layout)."""

from torch import Tensor

from fssa_kernels.native import DTYPE_CODES, NATIVE, empty, launch, rows_of, unsupported
from fssa_kernels.packed import PackedMatrix


def cannot_native(table: Tensor | PackedMatrix, index: Tensor, scale: float) -> str | None:
    """Why the native kernel is unable to serve these inputs, or None."""
    if not isinstance(table, PackedMatrix):
        return unsupported(table=table, index=index)
    if len(table.splits) > 1 or table.narrow:
        return (
            f"table was packed as {len(table.splits)} projections with narrow={table.narrow}, rows "
            "are taken from one in wide panels"
        )
    return unsupported(index=index)


def take_rows_native(table: Tensor | PackedMatrix, index: Tensor, scale: float) -> Tensor:
    """The public function on inputs that `cannot_native` accepts; ValueError for a bad index."""
    assert NATIVE is not None
    num_rows, width = table.shape
    y = empty(index, (index.shape[0], width), table.dtype, apart=True, own=True)
    data = table.data if isinstance(table, PackedMatrix) else table
    call = NATIVE.take_rows(
        rows_of(index),
        y.data_ptr(),
        y.stride(0),
        data.data_ptr(),
        DTYPE_CODES[table.dtype],
        isinstance(table, PackedMatrix),
        table.header_bytes if isinstance(table, PackedMatrix) else 0,
        data.stride(0),
        width,
        num_rows,
        index.data_ptr(),
        scale,
    )
    launch("take_rows", call, data, index)
    return y
