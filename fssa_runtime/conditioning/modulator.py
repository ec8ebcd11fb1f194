"""The hypernetwork: a latent z in, a user's row out, and the shared factors the rows act through.

    row = W_e z + b_e                                      (every generated site at once)
    gated:  y = x Wᵀ + ((x Aᵀ) ⊙ g) Bᵀ      core:  y = x Wᵀ + (x Aᵀ) Mᵀ Bᵀ
    film:   h ← γ ⊙ h + β

B starts at 0 and (γ, β) at (1, 0), so an untrained modulator leaves the model as it is. Source:
arXiv 2412.13998 (θ' = θ ⊙ τ(z)); the gated and core families are this project's.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from fssa_kernels import expand_modulation

from .layout import BaseShape, LinearName, ModulatorConfig, RowLayout, Site
from .modulation import LinearModulation, Modulation


class Modulator(nn.Module):
    """Shared factors A, B of every low-rank site and the linear map from z to rows.

    Args:
        config: families and latent size Z.
        decoder: the base model's shape.
    """

    def __init__(self, config: ModulatorConfig, decoder: BaseShape) -> None:
        super().__init__()
        self.config = config
        self.layout = RowLayout(config, decoder)
        self.num_layers = decoder.num_layers
        self.lora_a = nn.ParameterDict()
        self.lora_b = nn.ParameterDict()
        self.expand_weight = nn.Parameter(
            torch.zeros(self.layout.generated_width, config.latent_dim)
        )
        self.expand_bias = nn.Parameter(self.layout.identity()[: self.layout.generated_width])
        for site in self.layout.sites:
            self._initialise(site)

    def _initialise(self, site: Site) -> None:
        if site.family in ("factors", "film"):
            return
        for index, name in enumerate(site.members):
            if name not in site.projections:
                continue
            bound = 1 / math.sqrt(site.in_features)
            a = torch.empty(site.rank, site.in_features).uniform_(-bound, bound)
            self.lora_a[_key(site.layer, name)] = nn.Parameter(a)
            self.lora_b[_key(site.layer, name)] = nn.Parameter(
                torch.zeros(site.splits[index], site.rank)
            )
            if site.family in ("gated", "core"):
                # Only the pieces of modulated projections: the others' factors are zero, and so
                # are their gradients.
                size = site.width // len(site.splits)
                start = site.offset + index * size
                fan = self.config.latent_dim * (site.rank if site.family == "core" else 1)
                self.expand_weight.data[start : start + size].normal_(std=1 / math.sqrt(fan))

    def rows(self, z: torch.Tensor) -> torch.Tensor:
        """Generated part of the users' rows: ``z [U,Z] -> [U, generated_width]`` float32."""
        return expand_modulation(z, self.expand_weight, self.expand_bias)

    @torch.no_grad()
    def weaken(self, strength: float) -> None:
        """Move generated rows towards the identity: row ← identity + strength · (row − identity).

        The rows are linear in z, so this is exact, in the expansion's own weights.
        """
        if not 0 < strength <= 1:
            raise ValueError(f"strength: expected a number in (0, 1], got {strength}")
        identity = self.layout.identity()[: self.layout.generated_width].to(self.expand_bias)
        self.expand_weight.mul_(strength)
        self.expand_bias.copy_(torch.lerp(identity, self.expand_bias, strength))

    def stacked(self, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
        """Shared factors of a static, gated or core site: ``A [S*R, K]``, ``B [N, R]``.

        Projections of the group that are not modulated have zeros. Differentiable.
        """
        parts_a, parts_b = [], []
        for name, size in zip(site.members, site.splits, strict=True):
            if name in site.projections:
                parts_a.append(self.lora_a[_key(site.layer, name)])
                parts_b.append(self.lora_b[_key(site.layer, name)])
            else:
                device = self.expand_weight.device
                parts_a.append(torch.zeros(site.rank, site.in_features, device=device))
                parts_b.append(torch.zeros(size, site.rank, device=device))
        return torch.cat(parts_a), torch.cat(parts_b)

    def bind(
        self, table: torch.Tensor, slots: torch.Tensor, *, dtype: torch.dtype | None = None
    ) -> Modulation:
        """What a forward pass needs, from the users' rows ``table [U, W]`` and each token's slot.

        With ``dtype`` the shared factors are cast to it (serving); without, they stay float32 and
        gradients flow to them and to ``table`` (training). Rows are views into ``table``: what is
        written there later is seen by the next pass.
        """
        linears: list[dict[str, LinearModulation]] = [{} for _ in range(self.num_layers)]
        films: list[torch.Tensor | None] = [None] * self.num_layers
        for site in self.layout.sites:
            if site.family == "film":
                films[site.layer] = self.layout.piece(site, table)
            elif site.family == "factors":
                lora_a, lora_b = self.layout.factors(site, table)
                linears[site.layer][site.group] = LinearModulation(
                    "factors", site.splits, lora_a, lora_b, None
                )
            else:
                lora_a, lora_b = self.stacked(site)
                if dtype is not None:
                    lora_a, lora_b = (t.detach().to(table.device, dtype) for t in (lora_a, lora_b))
                rows = None if site.family == "static" else self.layout.piece(site, table)
                linears[site.layer][site.group] = LinearModulation(
                    site.family, site.splits, lora_a, lora_b, rows
                )
        return Modulation(linears, films, slots)


def _key(layer: int, name: LinearName) -> str:
    return f"{layer}_{name}"
