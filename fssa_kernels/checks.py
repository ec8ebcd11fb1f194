"""Argument checks of the public functions; cheap, because they run inside the decode loop."""

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

    torch looks at the range anyway, so the check is free; on a GPU it would have to synchronise.
    """
    try:
        return table.index_select(0, index)
    except IndexError as error:
        expected = f"values in [0, {table.shape[0]})"
        raise ValueError(f"{op}: {name}: expected {expected}, got {index.tolist()}") from error
