"""Triton's interpreter, made to compute in bfloat16 as a GPU does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle


def repair_bfloat16() -> None:
    """Mend two faults of the interpreter, seen in Triton 3.4 to 3.9.

    It truncates where float32 becomes bfloat16; a GPU's ``cvt.rn`` and torch round to the nearest
    value, ties to even. And it keeps bfloat16 as 16-bit integers, which ``tl.dot`` then multiplies
    as such.
    """
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        wide = torch.from_numpy(np.ascontiguousarray(source.data, dtype=np.float32))
        bits = wide.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(bits.reshape(source.data.shape), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            self.cast_impl(side, tl.float32) if side.dtype.scalar == tl.bfloat16 else side
            for side in (a, b)
        )
        return dot(self, a, b, *rest)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
