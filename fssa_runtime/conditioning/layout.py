"""Which parts of a model are modulated, how, and where each user's numbers lie in a table row.

A user is one row of numbers. The row is cut into one piece for each modulated site (a stacked
linear of a layer, or a layer's output); `RowLayout` knows the cuts and gives each op its view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from ..errors import InputError
from .modulation import LinearFamily

Family = LinearFamily | Literal["film"]
LinearName = Literal["q", "k", "v", "o", "gate", "up", "down"]
LINEARS: tuple[LinearName, ...] = ("q", "k", "v", "o", "gate", "up", "down")
# Linears that share their input are one stacked matrix, and one site.
GROUPS: dict[str, tuple[LinearName, ...]] = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
BLOCK = "block"


class FamilyConfig(BaseModel):
    """One family of modulation and the sites it acts on, in ``layers`` (None: in every one).

    ``static``, ``gated``, ``core`` and ``factors`` act on ``sites`` (linears) with ``rank``;
    ``film`` acts on the output of blocks and has neither.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: Family
    sites: tuple[LinearName, ...] = ()
    rank: int = Field(default=0, ge=0)
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.family == "film":
            if self.sites or self.rank:
                raise ValueError("film acts on every block output: expected no sites and no rank")
        elif not self.sites or not self.rank:
            raise ValueError(f"{self.family}: expected sites (of {', '.join(LINEARS)}) and a rank")
        if len(set(self.sites)) != len(self.sites):
            raise ValueError(f"{self.family}: a site is named twice in {list(self.sites)}")
        if self.layers is not None and len(set(self.layers)) != len(self.layers):
            raise ValueError(f"{self.family}: a layer is named twice in {list(self.layers)}")
        return self

    def acts_on(self, layer: int) -> bool:
        """Whether it has sites in this layer."""
        return self.layers is None or layer in self.layers

    def meets(self, other: FamilyConfig) -> bool:
        """Whether some layer may have sites of both."""
        if self.layers is None or other.layers is None:
            return True
        return not set(self.layers).isdisjoint(other.layers)


class ModulatorConfig(BaseModel):
    """All families of a conditioning checkpoint and the latent size Z they are generated from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    latent_dim: int = Field(ge=1)
    families: tuple[FamilyConfig, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_family_a_group(self) -> Self:
        if sum(f.family == "film" for f in self.families) > 1:
            raise ValueError("families: film is named twice")
        for group, members in GROUPS.items():
            sharing = [f for f in self.families if set(f.sites) & set(members)]
            kinds = {(f.family, f.rank) for f in sharing}
            if len(kinds) > 1:
                raise ValueError(
                    f"families: {', '.join(members)} share one matrix and so one family and rank, "
                    f"got {sorted(kinds)}"
                )
            claimed = [site for f in self.families for site in f.sites if site in members]
            if len(set(claimed)) != len(claimed):
                raise ValueError(f"families: a site of {group} is named by two families")
            if any(one.meets(other) for one, other in combinations(sharing, 2)):
                raise ValueError(
                    f"families: {', '.join(members)} share one matrix: name {', '.join(claimed)} "
                    "in one family, or in layers that differ"
                )
        return self


class BaseShape(Protocol):
    """The sizes of a base model that rows depend on: a `DecoderConfig` has them, and so does any
    model whose linears carry the usual names (`fssa_runtime.integrations.modules.base_shape`)."""

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def qkv_splits(self) -> tuple[int, int, int]: ...
    @property
    def gate_up_splits(self) -> tuple[int, int]: ...


@dataclass(frozen=True)
class Site:
    """One modulated place and its piece ``[offset, offset + width)`` of a row.

    For a linear group: ``splits`` are the output sizes of its stacked projections,
    ``projections`` those of them that are modulated, ``in_features`` K.
    """

    layer: int
    group: str
    family: Family
    rank: int
    projections: tuple[LinearName, ...]
    splits: tuple[int, ...]
    in_features: int
    offset: int
    width: int

    @property
    def members(self) -> tuple[LinearName, ...]:
        """Every projection stacked in this group, modulated or not."""
        return GROUPS[self.group]


class RowLayout:
    """Sites of a configuration on a model, and the width W of a row.

    Pieces a hypernetwork generates come first (``generated_width`` numbers); pieces that are data
    (``factors``: a user's own A and B) come after. ``static`` sites have no piece.
    """

    def __init__(self, config: ModulatorConfig, decoder: BaseShape) -> None:
        shapes = _group_shapes(decoder)
        found: list[Site] = []
        for family in config.families:
            beyond = [layer for layer in family.layers or () if layer >= decoder.num_layers]
            if beyond:
                raise InputError(
                    f"{family.family}: layers: expected some of the model's 0.."
                    f"{decoder.num_layers - 1}, got {beyond}"
                )
        for layer in range(decoder.num_layers):
            for family in config.families:
                if not family.acts_on(layer):
                    continue
                if family.family == "film":
                    width = 2 * decoder.hidden_size
                    found.append(
                        Site(layer, BLOCK, "film", 0, (), (), decoder.hidden_size, 0, width)
                    )
                    continue
                for group, members in GROUPS.items():
                    modulated = tuple(name for name in members if name in family.sites)
                    if modulated:
                        splits, in_features = shapes[group]
                        width = _width(family.family, family.rank, splits, in_features)
                        found.append(
                            Site(
                                layer,
                                group,
                                family.family,
                                family.rank,
                                modulated,
                                splits,
                                in_features,
                                0,
                                width,
                            )
                        )
        found.sort(key=lambda site: site.family == "factors")
        sites: list[Site] = []
        offset = 0
        for site in found:
            sites.append(Site(**{**site.__dict__, "offset": offset}))
            offset += site.width
        self.sites = tuple(sites)
        self.width = offset
        self.generated_width = sum(s.width for s in sites if s.family != "factors")

    def identity(self) -> torch.Tensor:
        """The row ``[W]`` float32 that leaves the model as it is: γ = 1, all else 0."""
        row = torch.zeros(self.width)
        for site in self.sites:
            if site.family == "film":
                row[site.offset : site.offset + site.width // 2] = 1.0
        return row

    @staticmethod
    def piece(site: Site, table: torch.Tensor) -> torch.Tensor:
        """The site's columns of ``table [U, W]``, in the shape its op takes; a view.

        film ``[U, 2, C]``; gated ``[U, S*R]``; core ``[U, S, R, R]``.
        """
        columns = table[:, site.offset : site.offset + site.width]
        if site.family == "film":
            return columns.unflatten(1, (2, -1))
        if site.family == "core":
            return columns.unflatten(1, (len(site.splits), site.rank, site.rank))
        return columns

    @staticmethod
    def factors(site: Site, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The users' own factors of a ``factors`` site: views ``[U, S*R, K]``, ``[U, N, R]``."""
        columns = table[:, site.offset : site.offset + site.width]
        num_a = len(site.splits) * site.rank * site.in_features
        lora_a = columns[:, :num_a].unflatten(1, (-1, site.in_features))
        lora_b = columns[:, num_a:].unflatten(1, (-1, site.rank))
        return lora_a, lora_b


def _width(family: str, rank: int, splits: tuple[int, ...], in_features: int) -> int:
    projections = len(splits)
    return {
        "static": 0,
        "gated": projections * rank,
        "core": projections * rank * rank,
        "factors": rank * (projections * in_features + sum(splits)),
    }[family]


def _group_shapes(decoder: BaseShape) -> dict[str, tuple[tuple[int, ...], int]]:
    hidden = decoder.hidden_size
    shapes = {
        "qkv": (decoder.qkv_splits, hidden),
        "o": ((hidden,), decoder.qkv_splits[0]),
        "gate_up": (decoder.gate_up_splits, hidden),
        "down": ((hidden,), decoder.gate_up_splits[0]),
    }
    assert all(math.prod(splits) > 0 for splits, _ in shapes.values())
    return shapes
