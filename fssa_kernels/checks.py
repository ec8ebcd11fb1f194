"""Argument checks of the public functions; cheap, because they run inside the decode loop.

With them what reads and adds by an index, which is checked on the way or kept in bounds.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32,)


def check_tensor(
    op: str,
    name: str,
    value: Any,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Raise unless `value` is a tensor of exactly this shape, one of these dtypes, on this device.

    Raises TypeError for a non-tensor or a wrong dtype, ValueError for a wrong shape or device.
    """
    if not isinstance(value, Tensor):
        bad_type(op, name, "a tensor", type(value).__name__)
    if value.shape != shape:
        bad_value(op, name, f"shape {tuple(shape)}", f"shape {tuple(value.shape)}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        bad_type(op, name, f"dtype {expected}", str(value.dtype))
    if value.device != device:
        bad_value(op, name, f"device {device}", f"device {value.device}")


def check_rank(op: str, name: str, value: Any, layout: str, rank: int) -> None:
    """Raise unless `value` is a tensor of `rank` dimensions, worded as `layout`."""
    if not isinstance(value, Tensor):
        bad_type(op, name, "a tensor", type(value).__name__)
    if value.dim() != rank:
        bad_value(op, name, f"shape {layout}", f"shape {tuple(value.shape)}")


def check_float(op: str, name: str, value: Tensor) -> None:
    """Raise TypeError unless `value` holds floating-point numbers the ops know."""
    if value.dtype not in FLOAT_DTYPES:
        expected = " or ".join(str(dtype) for dtype in FLOAT_DTYPES)
        bad_type(op, name, f"dtype {expected}", str(value.dtype))


def bad_value(op: str, name: str, expected: str, got: str) -> NoReturn:
    """Raise the ValueError every op uses: argument, expected, got."""
    raise ValueError(f"{op}: {name}: expected {expected}, got {got}")


def bad_type(op: str, name: str, expected: str, got: str) -> NoReturn:
    """Raise the TypeError every op uses: argument, expected, got."""
    raise TypeError(f"{op}: {name}: expected {expected}, got {got}")


def pick(op: str, name: str, table: Tensor, index: Tensor) -> Tensor:
    """table[index] along the first dimension; an index out of range is a ValueError on a CPU.

    torch looks at the range anyway, so the check is free. On a GPU the row is NaN.
    """
    if not can_check(table):
        if not table.shape[0]:
            return table.new_full((index.numel(), *table.shape[1:]), float("nan"))
        inside, bad = bounded(index, table.shape[0])
        picked = table.index_select(0, inside)
        return picked.masked_fill(_per_row(bad, picked), float("nan"))
    try:
        return table.index_select(0, index)
    except IndexError as error:
        expected = f"values in [0, {table.shape[0]})"
        raise ValueError(f"{op}: {name}: expected {expected}, got {index.tolist()}") from error


def sum_by_index(values: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """[num_rows, ...]: row i is the sum of the values[t] with index[t] = i.

    What has an index out of range counts nowhere on a GPU; on a CPU `pick` has raised before.
    """
    total = values.new_zeros(num_rows, *values.shape[1:])
    if not can_check(values):
        if not num_rows:
            return total
        index, bad = bounded(index, num_rows)
        values = values.masked_fill(_per_row(bad, values), 0.0)
    return total.index_add_(0, index, values)


def can_check(tensor: Tensor) -> bool:
    """Whether what is in it can be looked at; on a GPU that would synchronise.

    torch's own ops end every use of the GPU there, if an index is out of range.
    """
    return not tensor.is_cuda


def bounded(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(index, with 0 for whatever is outside [0, size), and where that is)."""
    bad = (index < 0) | (index >= size)
    return index.masked_fill(bad, 0), bad


def _per_row(flags: Tensor, rows: Tensor) -> Tensor:
    """The flag of every row, so that it broadcasts over the row."""
    return flags.reshape(-1, *(1,) * (rows.dim() - 1))
