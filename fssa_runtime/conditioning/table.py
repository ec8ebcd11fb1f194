"""The modulation table: a row of numbers for every user in flight, row 0 for nobody."""

from __future__ import annotations

import torch

from ..errors import InputError
from .layout import RowLayout


class ModulationTable:
    """Rows ``[max_users + 1, W]``. Slot 0 is the identity and never changes.

    A freed row is filled with NaN: whoever still reads it is seen at once.
    """

    def __init__(
        self,
        layout: RowLayout,
        max_users: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if max_users < 1:
            raise ValueError(f"max_users must be at least 1, got {max_users}")
        self.layout = layout
        self.rows = torch.full(
            (max_users + 1, layout.width), float("nan"), dtype=dtype, device=device
        )
        self.rows[0] = layout.identity()
        self._free = list(range(max_users, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def add(self, row: torch.Tensor) -> int:
        """Put a user's ``row [W]`` into a free slot and return the slot.

        Raises:
            InputError: wrong length, NaN or infinity; nothing is stored.
            RuntimeError: no slot is free.
        """
        self.check(row)
        if not self._free:
            raise RuntimeError(f"all {len(self.rows) - 1} slots of the modulation table are taken")
        slot = self._free.pop()
        self.rows[slot] = row.detach()
        return slot

    def remove(self, slot: int) -> None:
        """Free a slot.

        Raises:
            ValueError: slot 0, out of range, or free already.
        """
        if not 0 < slot < len(self.rows) or slot in self._free:
            raise ValueError(f"slot {slot} is not in use")
        self.rows[slot] = float("nan")
        self._free.append(slot)

    def check(self, row: torch.Tensor) -> None:
        """Raise InputError for a row of the wrong length, or not finite in the table's dtype."""
        if row.shape != (self.layout.width,):
            raise InputError(
                f"modulation row: expected shape [{self.layout.width}], got {list(row.shape)}"
            )
        # Checked after rounding to the table's dtype: a large float32 may be infinite there.
        if not torch.isfinite(row.detach().to(self.rows.dtype)).all():
            raise InputError("modulation row: expected finite numbers, got NaN or infinity")
