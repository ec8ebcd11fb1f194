"""Whose row of a batch is whose, for models that compute on whole batches ``[B, S, …]``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fssa_kernels import expand_modulation

from ..conditioning.layout import RowLayout
from ..conditioning.modulator import Modulator
from ..conditioning.user_weights import UserWeights
from ..errors import InputError

# A latent z [Z], a known name, shares of known names, weights themselves, or None for nobody.
Who = torch.Tensor | str | Mapping[str, float] | UserWeights | None


@dataclass(frozen=True)
class Rows:
    """A table of users and the slot of every row of the batch.

    Attributes:
        table: ``[U, W]``, row 0 the identity.
        slots: of each prompt.
        for_all: there is one slot, and it is every row's.
        may_repeat: rows may come several times each, one after the other: beams.
    """

    table: torch.Tensor
    slots: tuple[int, ...]
    for_all: bool
    may_repeat: bool = False
    _cache: dict[tuple[torch.device, int, int], torch.Tensor] = field(
        default_factory=dict, repr=False
    )

    def repeatable(self) -> Rows:
        """The same users, for a ``generate`` that has counted its prompts."""
        return replace(self, may_repeat=True, _cache={})

    def check(self, num_rows: int) -> None:
        """Raise InputError unless there is a user for each of a batch's rows."""
        if self.for_all or num_rows == len(self.slots):
            return
        if self.may_repeat and num_rows % len(self.slots) == 0:
            return
        raise InputError(
            f"a batch of {num_rows} rows: expected {len(self.slots)}, one for each of the users"
        )

    def of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The table where ``x [B, …, C]`` is, and the slot of each of its vectors, ``[T]`` int32.

        Raises:
            InputError: B is not the number of users.
        """
        num_rows, per_row = x.shape[0], math.prod(x.shape[1:-1])
        key = (x.device, num_rows, per_row)
        if key not in self._cache:
            self.check(num_rows)
            given = torch.tensor(self.slots, dtype=torch.int32, device=x.device)
            times = num_rows if self.for_all else num_rows // len(self.slots)
            self._cache[key] = given.repeat_interleave(times * per_row)
        return self.table.to(x.device), self._cache[key]


@dataclass
class RowMaker:
    """People, however they are named, to a table.

    Attributes:
        latents: ``z [Z]`` of those known by name.
        trainable: whether gradients reach the modulator's parameters.
    """

    modulator: Modulator
    trainable: bool
    latents: dict[str, torch.Tensor] = field(default_factory=dict)

    def make(self, whose: Who | Sequence[Who], device: torch.device) -> Rows:
        """Rows of a list of people, or of one for everybody.

        Raises:
            InputError: nobody at all, an unknown name, or what is no latent, share or row.
        """
        alone = whose is None or isinstance(whose, str | Mapping | UserWeights)
        if isinstance(whose, torch.Tensor):
            alone = whose.ndim == 1
        people: list[Who] = [whose] if alone else list(whose)  # type: ignore[arg-type,list-item]
        if not people:
            raise InputError("users: expected at least one, got none")
        identity = self.modulator.layout.identity().to(device)
        table, slots = [identity], []
        for who in people:
            slots.append(0 if who is None else len(table))
            if who is not None:
                table.append(self._row(who, identity))
        return Rows(torch.stack(table), tuple(slots), for_all=alone)

    def check_latent(self, latent: torch.Tensor) -> None:
        """Raise InputError unless it is ``[Z]`` and finite."""
        expected = self.modulator.config.latent_dim
        if latent.shape != (expected,):
            raise InputError(f"latent: expected shape [{expected}], got {list(latent.shape)}")
        if not torch.isfinite(latent.detach()).all():
            raise InputError("latent: expected finite numbers, got NaN or infinity")

    def _row(
        self, who: torch.Tensor | str | Mapping[str, float] | UserWeights, identity: torch.Tensor
    ) -> torch.Tensor:
        """``[W]`` float32 of one person or mixture, as `Conditioning.blend` defines it."""
        if isinstance(who, torch.Tensor):
            return self._generated(who, identity)
        if isinstance(who, str):
            return self._generated(self._known(who), identity)
        if isinstance(who, UserWeights):
            return _checked_row(self.modulator.layout, who.make_row()).to(identity)
        if not isinstance(who, Mapping) or not who:
            kind = "no shares" if isinstance(who, Mapping) else type(who).__name__
            raise InputError(
                f"users: expected a latent, a name, shares of names, weights or None, got {kind}"
            )
        row = identity
        for name, share in who.items():
            if not math.isfinite(share):
                raise InputError(f"share of {name!r}: expected a finite number, got {share}")
            row = row + share * (self._generated(self._known(name), identity) - identity)
        return row

    def _known(self, name: str) -> torch.Tensor:
        if name not in self.latents:
            known = ", ".join(sorted(self.latents)) or "nobody"
            raise InputError(f"user {name!r} is not known: expected one of {known}")
        return self.latents[name]

    def _generated(self, latent: torch.Tensor, identity: torch.Tensor) -> torch.Tensor:
        self.check_latent(latent)
        weight, bias = self.modulator.expand_weight, self.modulator.expand_bias
        if not self.trainable:
            weight, bias = (p.detach().to(identity.device) for p in (weight, bias))  # type: ignore[assignment]
        (generated,) = expand_modulation(latent.to(identity)[None], weight, bias)
        return torch.cat([generated, identity[len(generated) :]])


def _checked_row(layout: RowLayout, row: torch.Tensor) -> torch.Tensor:
    if row.shape != (layout.width,):
        raise InputError(f"weights: expected a row of {layout.width}, got {list(row.shape)}")
    if not torch.isfinite(row.detach()).all():
        raise InputError("weights: expected finite numbers, got NaN or infinity")
    return row
