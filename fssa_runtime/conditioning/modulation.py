"""What one forward pass needs to know of the users in its batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

LinearFamily = Literal["static", "gated", "core", "factors"]


@dataclass(frozen=True)
class LinearModulation:
    """The low-rank term of one (stacked) linear; arguments of ``fssa_kernels.modulated_linear``."""

    family: LinearFamily
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    rows: torch.Tensor | None


@dataclass(frozen=True)
class Modulation:
    """Modulation of every site of a model for the tokens of one step.

    ``linears[l]`` maps a group (``qkv``, ``o``, ``gate_up``, ``down``) of layer ``l`` to its term;
    a missing group is unmodulated. ``films[l]`` is ``[U, 2, C]`` or None. ``slots`` is ``[T]``
    int32: the row of each token's user, 0 for nobody.
    """

    linears: Sequence[Mapping[str, LinearModulation]]
    films: Sequence[torch.Tensor | None]
    slots: torch.Tensor = field(repr=False)

    def with_slots(self, slots: torch.Tensor) -> Modulation:
        """The same modulation for other tokens."""
        return Modulation(self.linears, self.films, slots)
