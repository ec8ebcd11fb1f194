"""Taking rows on a GPU: one program copies one block of columns of one row."""

import triton
import triton.language as tl
from torch import Tensor

from fssa_kernels.gpu.backend import unsupported
from fssa_kernels.gpu.launch import launch
from fssa_kernels.packed import PackedMatrix

# 128 threads take 16 bytes of bf16 each, so that a single row still keeps several programs busy.
MAX_BLOCK = 1024


@triton.jit
def take_rows_kernel(
    y_ptr, table_ptr, index_ptr, num_rows, width, stride_table, scale, BLOCK: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = c < width
    # One element rather than a scalar: the interpreter mistypes masks joined with scalars.
    row = tl.load(index_ptr + t + tl.arange(0, 1))
    known = (row >= 0) & (row < num_rows)
    source = table_ptr + row.to(tl.int64) * stride_table
    x = tl.load(source + c, mask=in_row & known, other=float("nan"))
    y = (x.to(tl.float32) * scale).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + t * width + c, y, mask=in_row)


def cannot_triton(table: Tensor | PackedMatrix, index: Tensor, scale: float) -> str | None:
    """Why the kernel is unable to serve these inputs, or None."""
    if isinstance(table, PackedMatrix):
        return "table is packed for the native CPU kernels"
    return unsupported(table=table, index=index)


def take_rows_triton(table: Tensor, index: Tensor, scale: float) -> Tensor:
    """The public function on inputs that `cannot_triton` accepts; NaN for an index out of range."""
    num_rows, width = table.shape
    y = table.new_empty(index.shape[0], width)
    block = min(MAX_BLOCK, max(16, triton.next_power_of_2(width)))
    launch(
        take_rows_kernel,
        (index.shape[0], triton.cdiv(width, block)),
        {
            "y_ptr": y,
            "table_ptr": table,
            "index_ptr": index,
            "num_rows": num_rows,
            "width": width,
            "stride_table": table.stride(0),
            "scale": scale,
            "BLOCK": block,
        },
        num_warps=max(1, block // 256),
    )
    return y
