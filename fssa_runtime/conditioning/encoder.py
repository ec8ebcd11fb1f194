"""Preference encoder: a few choices of one user in, a latent z out (METHOD.md section 3).

    z = h2( aggregate_j mean_r h1([e(chosen_j), e(rejected_jr)]) ),   j = 1..n

A pair has one rejected option; a choice among K has K - 1, and h1 is averaged over them. The result
does not depend on the order of the choices nor of the rejected options (up to rounding), any n is
allowed, and n = 0 gives a learned prior latent. Source: arXiv 2412.13998, section 3 (pairs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

Aggregate = Literal["mean", "sum", "attention"]

# The scale of q(z|D_C) stays in (e^-6, e^2): wide enough for any useful posterior, and neither the
# KL nor a sample can overflow early in training.
MIN_LOG_STD = -6.0
MAX_LOG_STD = 2.0


class EncoderSettings(BaseModel):
    """What a recipe chooses about the encoder; the option size comes from the data.

    ``pair_encoder`` is h1: two layers, or one linear map. ``scale`` bounds the standard deviation
    of a stochastic encoder (``sigmoid``) or not (``softplus``). The second of each is what the
    authors' checkpoints have.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    latent_dim: int = Field(default=256, ge=1)
    hidden_dim: int = Field(default=256, ge=1)
    aggregate: Aggregate = "mean"
    stochastic: bool = False
    num_heads: int = Field(default=8, ge=1)
    pair_encoder: Literal["mlp", "linear"] = "mlp"
    scale: Literal["sigmoid", "softplus"] = "sigmoid"

    @model_validator(mode="after")
    def _heads_divide_hidden(self) -> Self:
        if self.aggregate == "attention" and self.hidden_dim % self.num_heads:
            raise ValueError(
                f"hidden_dim must be a multiple of num_heads for attention, "
                f"got hidden_dim={self.hidden_dim}, num_heads={self.num_heads}"
            )
        return self


class EncoderConfig(EncoderSettings):
    """Everything needed to build a `PreferenceEncoder`; `option_dim` is E."""

    option_dim: int = Field(ge=1)


class Latent(NamedTuple):
    """q(z | D_C) for U users: `mean` [U, Z]; `log_std` [U, Z], or None when deterministic."""

    mean: Tensor
    log_std: Tensor | None

    def rsample(self, generator: torch.Generator | None = None) -> Tensor:
        """z = mean + exp(log_std) ⊙ ε with ε ~ N(0, I), [U, Z]; the mean when deterministic.

        Differentiable in mean and log_std; reproducible from `generator`, else from torch's
        global generator.
        """
        if self.log_std is None:
            return self.mean
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return self.mean + self.log_std.exp() * noise

    def samples(self, noise: Tensor) -> Tensor:
        """z_s = mean + exp(log_std) ⊙ noise_s, [U, S, Z], from noise [S, Z] that all users share or
        [U, S, Z]. ValueError when deterministic: there is nothing to sample."""
        if self.log_std is None:
            raise ValueError("samples: expected a stochastic encoder, got a deterministic one")
        return self.mean[:, None] + self.log_std.exp()[:, None] * noise


def antithetic_noise(
    shape: tuple[int, ...], num_samples: int, generator: torch.Generator | None = None
) -> Tensor:
    """Standard normal noise [*shape[:-1], S, shape[-1]] whose second half is minus its first.

    Means over such samples are exact for anything odd in the noise: for a population of two
    equally frequent kinds, exactly half of the samples are of each. ValueError when S is odd.
    """
    if num_samples < 2 or num_samples % 2:
        raise ValueError(f"num_samples: expected an even number, got {num_samples}")
    half = torch.randn(*shape[:-1], num_samples // 2, shape[-1], generator=generator)
    return torch.cat([half, -half], dim=-2)


@dataclass(frozen=True)
class ContextSummary:
    """All an additive encoder keeps of the choices seen: Σ_j h1(...) [U, hidden], n [U] int64."""

    total: Tensor
    count: Tensor

    def merge(self, other: ContextSummary) -> ContextSummary:
        """Summary of both sets of choices together (equal to the batch one up to rounding)."""
        return ContextSummary(self.total + other.total, self.count + other.count)


class OptionScaler(nn.Module):
    """x ↦ (x - mean) / std per feature; the statistics are buffers and so saved and loaded.

    Hidden states of language models have a few features thousands of times larger than the
    rest; unscaled, those are all that a freshly initialised layer sees.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, option_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(option_dim))
        self.register_buffer("std", torch.ones(option_dim))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Use these statistics, both [E]. ValueError when misshapen, not finite or std <= 0."""
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != self.mean.shape:
                raise ValueError(
                    f"{name}: expected shape {tuple(self.mean.shape)}, got {tuple(value.shape)}"
                )
            if not torch.isfinite(value).all():
                raise ValueError(f"{name}: expected finite values, got NaN or infinity")
        if not (std > 0).all():
            raise ValueError(f"std: expected positive values, got a minimum of {std.min().item()}")
        self.mean.copy_(mean)
        self.std.copy_(std)

    def fit(self, options: Tensor) -> None:
        """Take the statistics of `options` [M, E]; a constant feature keeps its scale."""
        if options.ndim != 2 or options.shape[0] < 2:
            raise ValueError(
                f"options: expected [M, E] with M >= 2, got shape {tuple(options.shape)}"
            )
        wide = options.double()
        std = wide.std(dim=0)
        self.set_statistics(wide.mean(dim=0), torch.where(std > 0, std, torch.ones_like(std)))

    def forward(self, options: Tensor) -> Tensor:
        return (options.to(self.mean.dtype) - self.mean) / self.std


def bounded_log_std(raw: Tensor) -> Tensor:
    """Any number → log of a scale in (e^MIN_LOG_STD, e^MAX_LOG_STD)."""
    return MIN_LOG_STD + (MAX_LOG_STD - MIN_LOG_STD) * torch.sigmoid(raw)


def two_layer_mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Linear → ReLU → Linear: the shape of h1, h2 and the option encoder of the reward."""
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_dim))


class PreferenceEncoder(nn.Module):
    """z = h2( aggregate_j mean_r h1([e(chosen_j), e(rejected_jr)]) ), permutation invariant.

    Aggregates, over the n choices of a user:
      - "mean": Deep Set. A mean forgets n, and three agreeing choices are weaker evidence than
        ten, so h2 also reads log(1 + n).
      - "sum": Deep Set; n is visible in the size of the sum.
      - "attention": self-attention with `num_heads` heads over the encoded choices, then the sum.
    With n = 0 the result is a learned prior (`prior`), not h2 of an empty aggregate.

    "mean" and "sum" can also be kept up to date as choices arrive: `summarise` the new ones,
    `ContextSummary.merge` into the stored summary, `latent_from_summary`.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_dim
        out_dim = config.latent_dim * (2 if config.stochastic else 1)
        self.scaler = OptionScaler(config.option_dim)
        self.h1: nn.Module = (
            nn.Linear(2 * config.option_dim, hidden)
            if config.pair_encoder == "linear"
            else two_layer_mlp(2 * config.option_dim, hidden, hidden)
        )
        if config.aggregate == "attention":
            self.attention_qkv = nn.Linear(hidden, 3 * hidden)
            self.attention_out = nn.Linear(hidden, hidden)
        self.h2 = two_layer_mlp(hidden + (config.aggregate == "mean"), hidden, out_dim)
        self.prior = nn.Parameter(torch.zeros(out_dim))

    def forward(self, chosen: Tensor, rejected: Tensor, mask: Tensor) -> Latent:
        """Latent of U users from their padded choices.

        chosen: [U, n, E] floating point, options as the caller embeds them (scaled inside); n may
            be 0. Pairs: rejected [U, n, E], mask [U, n] bool, True for a real pair. Choices among
            up to R + 1 options: rejected [U, n, R, E], mask [U, n, R] bool, True for a real
            rejected option; a choice without any is padding. What lies in padded places, NaN
            included, has no influence on values or gradients.
        Returns `Latent` with mean [U, Z] (and log_std [U, Z] if stochastic) in the dtype of the
        parameters. Raises ValueError or TypeError on wrong shapes or mask dtype. Deterministic.
        """
        encoded = self._encode_choices(chosen, rejected, mask)
        real = real_choices(mask)
        if self.config.aggregate == "attention" and encoded.shape[1]:
            encoded = self._attend(encoded, real)
        return self.latent_from_summary(ContextSummary(encoded.sum(dim=1), real.sum(dim=1)))

    @torch.no_grad()
    def scale_latents(self, factor: float) -> None:
        """Multiply every latent this encoder gives by `factor` > 0, exactly, in its weights."""
        if not factor > 0:
            raise ValueError(f"factor: expected a positive number, got {factor}")
        last = self._last_layer()
        for parameter in (last.weight, last.bias, self.prior):
            parameter.mul_(factor)

    @torch.no_grad()
    def centre_latents(self) -> None:
        """Subtract the prior from every latent this encoder gives, exactly, in its weights: a user
        without choices then is at zero."""
        self._last_layer().bias.sub_(self.prior)
        self.prior.zero_()

    def _last_layer(self) -> nn.Linear:
        if self.config.stochastic:
            raise ValueError("expected a deterministic encoder, got a stochastic one")
        last = self.h2[-1]
        assert isinstance(last, nn.Linear)
        return last

    def summarise(self, chosen: Tensor, rejected: Tensor, mask: Tensor) -> ContextSummary:
        """Σ_j h1(...) and n of the given choices; arguments as for `forward`.

        ValueError for "attention": there every pair's encoding depends on all the others, so an
        old summary cannot be extended.
        """
        if self.config.aggregate == "attention":
            raise ValueError(
                "aggregate: expected 'mean' or 'sum' to summarise choices, got 'attention'"
            )
        encoded = self._encode_choices(chosen, rejected, mask)
        return ContextSummary(encoded.sum(dim=1), real_choices(mask).sum(dim=1))

    def latent_from_summary(self, summary: ContextSummary) -> Latent:
        """h2 of the aggregate, or the prior where the count is 0."""
        pooled, count = summary.total, summary.count[:, None]
        if self.config.aggregate == "mean":
            n = count.to(pooled.dtype)
            pooled = torch.cat([pooled / n.clamp(min=1), torch.log1p(n)], dim=-1)
        out = torch.where(count > 0, self.h2(pooled), self.prior)
        if not self.config.stochastic:
            return Latent(out, None)
        mean, raw = out.chunk(2, dim=-1)
        if self.config.scale == "softplus":
            return Latent(mean, F.softplus(raw).log())
        return Latent(mean, bounded_log_std(raw))

    def _encode_choices(self, chosen: Tensor, rejected: Tensor, mask: Tensor) -> Tensor:
        """mean_r h1 of every choice, [U, n, hidden], zero in padded places."""
        check_choices(chosen, rejected, mask, self.config.option_dim)
        # Blanked before the first layer: a NaN zeroed only afterwards would still reach the
        # gradient of h1's weights.
        real = real_choices(mask)[..., None]
        chosen = self.scaler(chosen.masked_fill(~real, 0.0))
        rejected = self.scaler(rejected.masked_fill(~mask[..., None], 0.0))
        if mask.ndim == 2:
            return self.h1(torch.cat([chosen, rejected], dim=-1)).masked_fill(~real, 0.0)
        chosen = chosen[:, :, None].expand_as(rejected)
        encoded = self.h1(torch.cat([chosen, rejected], dim=-1))
        encoded = encoded.masked_fill(~mask[..., None], 0.0).sum(dim=2)
        return encoded / mask.sum(dim=2).clamp(min=1)[..., None]

    def _attend(self, encoded: Tensor, mask: Tensor) -> Tensor:
        """Multi-head self-attention among the real choices, zero in padded places."""
        num_users, n, hidden = encoded.shape
        heads = self.config.num_heads
        qkv = self.attention_qkv(encoded).view(num_users, n, 3, heads, hidden // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # A softmax over no key at all is NaN: users without choices attend to their (blank)
        # padding, and the mask below removes the result.
        keys = mask | ~mask.any(dim=1, keepdim=True)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys[:, None, None, :])
        mixed = mixed.transpose(1, 2).reshape(num_users, n, hidden)
        return self.attention_out(mixed).masked_fill(~mask[..., None], 0.0)


def real_choices(mask: Tensor) -> Tensor:
    """[U, n] bool: which choices are real, from a mask of pairs [U, n] or of rejected options
    [U, n, R]."""
    return mask if mask.ndim == 2 else mask.any(dim=2)


def check_choices(chosen: Tensor, rejected: Tensor, mask: Tensor, option_dim: int) -> None:
    """ValueError or TypeError unless chosen is [U, n, E], rejected [U, n, E] or [U, n, R, E], and
    mask bool of rejected's shape without E."""
    if chosen.ndim != 3 or chosen.shape[-1] != option_dim:
        raise ValueError(f"chosen: expected [U, n, {option_dim}], got {tuple(chosen.shape)}")
    pairs = tuple(chosen.shape)
    several = rejected.ndim == 4 and (*rejected.shape[:2], rejected.shape[3]) == pairs
    if tuple(rejected.shape) != pairs and not several:
        raise ValueError(
            f"rejected: expected the shape of chosen {pairs}, or [U, n, R, E] for choices among "
            f"more than two, got {tuple(rejected.shape)}"
        )
    if mask.shape != rejected.shape[:-1]:
        raise ValueError(
            f"mask: expected {tuple(rejected.shape[:-1])} to match rejected, "
            f"got {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected dtype torch.bool, got {mask.dtype}")
