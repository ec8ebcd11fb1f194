"""What computes the modulated parts of a transformers model, in place of its own forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fssa_kernels import modulated_linear

from ..conditioning.layout import LinearName, RowLayout, Site
from ..conditioning.modulator import Modulator
from .rows import Rows


@dataclass
class Current:
    """For whom the model computes now; None: it is the base.

    ``rows`` are those of an open block, ``once`` those of one forward pass.
    """

    rows: Rows | None = None
    once: Rows | None = None

    @property
    def now(self) -> Rows | None:
        return self.rows if self.once is None else self.once


# Objects and not closures, so that a deep copy of a model has copies of its own.
class ModulatedLinear:
    """One linear's forward: the base's own, or the op while there are users."""

    def __init__(
        self,
        current: Current,
        modulator: Modulator,
        linear: nn.Linear,
        site: Site,
        name: LinearName,
        *,
        trainable: bool,
    ) -> None:
        self._current, self._modulator, self._linear, self._site = current, modulator, linear, site
        self._index = site.members.index(name)
        self._key = f"{site.layer}_{name}"
        self._trainable = trainable
        self._cast: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        linear, rows, site = self._linear, self._current.now, self._site
        if rows is None:
            return type(linear).forward(linear, x)
        weight: torch.Tensor = linear.weight
        bias: torch.Tensor | None = linear.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        table, slots = rows.of(x)
        part = None
        if site.family == "factors":
            lora_a, lora_b = self._own(table, x.dtype)
        else:
            lora_a, lora_b = self._shared(x)
            if site.family != "static":
                piece = RowLayout.piece(site, table)
                size = site.rank if site.family == "gated" else 1
                part = piece[:, self._index * size : (self._index + 1) * size]
        y = modulated_linear(
            x.reshape(-1, x.shape[-1]),
            weight,
            bias,
            lora_a,
            lora_b,
            part,
            None if site.family == "static" else slots,
            family=site.family,
        )
        return y.view(*x.shape[:-1], -1)

    def _own(self, table: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The users' own factors of this projection, ``[U, R, K]`` and ``[U, N_s, R]``."""
        site, rank = self._site, self._site.rank
        lora_a, lora_b = RowLayout.factors(site, table)
        first, start = self._index * rank, sum(site.splits[: self._index])
        lora_a = lora_a[:, first : first + rank]
        lora_b = lora_b[:, start : start + site.splits[self._index]]
        return lora_a.to(dtype), lora_b.to(dtype)

    def _shared(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B: the parameters themselves in training, else copies in x's dtype, kept."""
        lora_a, lora_b = self._modulator.lora_a[self._key], self._modulator.lora_b[self._key]
        if self._trainable:
            return lora_a, lora_b
        kept = self._cast
        if kept is None or kept[0].device != x.device or kept[0].dtype != x.dtype:
            kept = (lora_a.detach().to(x.device, x.dtype), lora_b.detach().to(x.device, x.dtype))
            self._cast = kept
        return kept


class Film:
    """Hook on a block: ``h ← γ ⊙ h + β``, each row's own, computed in float32 at least."""

    def __init__(self, current: Current, site: Site) -> None:
        self._current, self._site = current, site

    def __call__(self, layer: nn.Module, inputs: Any, output: Any) -> Any:
        rows = self._current.now
        if rows is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        table, slots = rows.of(hidden)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        film = RowLayout.piece(self._site, table)[slots.long()].to(wide)
        gamma, beta = (part.view(hidden.shape) for part in film.unbind(1))
        changed = torch.addcmul(beta, gamma, hidden.to(wide)).to(hidden.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed
