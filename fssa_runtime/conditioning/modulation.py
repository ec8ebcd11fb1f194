"""What one forward pass needs to know of the users in its batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from fssa_kernels import PackArena, PackedMatrix, pack_matrix

LinearFamily = Literal["static", "gated", "core", "factors"]


@dataclass(frozen=True)
class LinearModulation:
    """The low-rank term of one linear that stacks projections of sizes ``splits``.

    The rest are arguments of ``fssa_kernels.modulated_linear``; ``extended`` is ``[W | B]`` of the
    same linear (`fssa_kernels.extend_weight`), if the decoder keeps its weights so.
    """

    family: LinearFamily
    splits: tuple[int, ...]
    lora_a: torch.Tensor | PackedMatrix
    lora_b: torch.Tensor | PackedMatrix
    rows: torch.Tensor | None
    extended: torch.Tensor | None = None

    def pack(self, *, paired: bool, arena: PackArena) -> LinearModulation:
        """The same with A and B laid out for the native kernels, unless they are a user's own."""
        lora_a, lora_b = self.lora_a, self.lora_b
        if self.family == "factors":
            return self
        if not isinstance(lora_a, PackedMatrix):
            lora_a = pack_matrix(lora_a, narrow=True, arena=arena)
        if not isinstance(lora_b, PackedMatrix):
            lora_b = pack_matrix(lora_b, splits=self.splits, paired=paired, arena=arena)
        return replace(self, lora_a=lora_a, lora_b=lora_b)


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

    def term(self, layer: int, group: str) -> LinearModulation | None:
        """What modulates a linear, or None."""
        return self.linears[layer].get(group)

    def pack(self) -> Modulation:
        """The same for a decoder whose weights are packed (`Decoder.pack`)."""
        arena = PackArena()
        linears = [
            {
                # The activation multiplies gate and up, and nothing else is multiplied.
                group: term.pack(paired=group == "gate_up", arena=arena)
                for group, term in terms.items()
            }
            for terms in self.linears
        ]
        return Modulation(linears, self.films, self.slots)
