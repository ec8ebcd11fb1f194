"""Cases of take_rows: few and many, repeated, empty, strided, scaled."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fssa_kernels.testing import Inputs, OpCase, normal, num_bytes, within_wider


@dataclass(frozen=True)
class _Sizes:
    num_rows: int = 23
    width: int = 37
    taken: int = 6
    scale: float = 1.0
    strided: bool = False

    def make(self, g: torch.Generator, dtype: torch.dtype) -> Inputs:
        table = normal(g, self.num_rows, self.width, dtype=dtype)
        index = torch.randint(self.num_rows, (self.taken,), generator=g, dtype=torch.int32)
        return {
            "table": within_wider(table) if self.strided else table,
            "index": index,
            "scale": self.scale,
        }


def _work(inputs: Inputs) -> tuple[int, int]:
    table, index = inputs["table"], inputs["index"]
    distinct = int(index.unique().numel())
    rows = (distinct + len(index)) * table.shape[1] * table.element_size()
    return rows + num_bytes(index), 0


_CASES = {
    "few": _Sizes(),
    "one": _Sizes(taken=1, width=64),
    "none": _Sizes(taken=0),
    "repeated": _Sizes(num_rows=3, taken=9),
    "scaled": _Sizes(scale=24.0),
    "strided": _Sizes(strided=True),
    "wide": _Sizes(width=130, taken=40),
}


def cases() -> Iterator[OpCase]:
    """Every case of take_rows."""
    for name, sizes in _CASES.items():
        yield OpCase("take_rows", name, sizes.make, _work)
