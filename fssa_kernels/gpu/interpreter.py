"""Triton's interpreter, made to multiply and to compute in bfloat16 as a GPU does, and sooner."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle


def repair() -> None:
    """Mend three faults of the interpreter, seen in Triton 3.4 to 3.9, and make it faster.

    It truncates where float32 becomes bfloat16; a GPU's ``cvt.rn`` and torch round to the nearest
    value, ties to even. And it keeps bfloat16 as 16-bit integers, which ``tl.dot`` then multiplies
    as such. And numpy's product, by which it multiplies, may give a row other bits in another place
    of the tile (OpenBLAS on AVX2 does), which no matrix instruction of a GPU does.

    Whenever a kernel calls a function, it puts its own operators in the place of all of Triton's
    again, which takes longer than most functions do: once in a launch is enough.
    """
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        wide = torch.from_numpy(np.ascontiguousarray(source.data, dtype=np.float32))
        bits = wide.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(bits.reshape(source.data.shape), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        a, b = (
            self.cast_impl(side, tl.float32) if side.dtype.scalar == tl.bfloat16 else side
            for side in (a, b)
        )
        if not d.dtype.scalar.is_floating():
            return dot(self, a, b, d, *rest)
        kind = d.data.dtype
        return TensorHandle(
            d.data + product(a.data.astype(kind), b.data.astype(kind)), d.dtype.scalar
        )

    launched, function = interpreter.GridExecutor, interpreter.InterpretedFunction
    launch, call = launched.__call__, function.__call__
    called: set[Any] = set()  # functions, by this launch

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        called.clear()
        launch(self, *args, **kwargs)

    def call_again(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in called:
            called.add(self.fn)
            return call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    launched.__call__, function.__call__ = launch_anew, call_again


def product(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """a b for ``[..., M, K]`` and ``[..., K, N]``: each number one chain of additions over K."""
    total = a[..., :, :1] * b[..., :1, :]
    for k in range(1, a.shape[-1]):
        total += a[..., :, k : k + 1] * b[..., k : k + 1, :]
    return total
