"""What is known of a user: a posterior over the latent, brought up to date choice by choice.

With the aggregates "mean" and "sum" a belief keeps one vector and a count, and a new choice costs
one evaluation of h1 and h2, whatever was chosen before. With "attention" every choice's encoding
depends on all others: the options' embeddings are kept, so that at least no text is read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..models.language_model import LanguageModel
from .checkpoint import Conditioning
from .choices import Choice, ChoiceLike, arranged, checked_choices, options_of
from .embedding import MAX_BATCH_TOKENS, Steps, embedding_steps, result_of
from .encoder import ContextSummary, Latent, PreferenceEncoder, check_choices


@dataclass(frozen=True)
class Belief:
    """q(z | choices so far) of one user, and what it takes to extend it.

    `mean` [Z] steers; `std` [Z] says how sure that is, None for a deterministic encoder; `count`
    choices are in it. An update makes another `Belief`.
    """

    mean: Tensor
    std: Tensor | None
    count: int
    _summary: ContextSummary | None
    _options: tuple[Tensor, Tensor, Tensor] | None

    @property
    def latent(self) -> Latent:
        """As the encoder gives it, for one user: mean and log_std [1, Z]."""
        log_std = None if self.std is None else self.std.log()[None]
        return Latent(self.mean[None], log_std)


@torch.no_grad()
def prior_belief(encoder: PreferenceEncoder) -> Belief:
    """Of somebody who has made no choice."""
    nothing = torch.zeros(0, encoder.config.option_dim)
    return _extended(encoder, None, nothing, nothing, torch.ones(0, dtype=torch.bool))


@torch.no_grad()
def update_belief(
    encoder: PreferenceEncoder,
    belief: Belief,
    chosen: Tensor,
    rejected: Tensor,
    mask: Tensor | None = None,
) -> Belief:
    """The belief after k more choices; equal to one made of all choices at once, up to rounding.

    chosen [k, E]; rejected [k, E] for pairs or [k, R, E] with the mask [k, R] bool of its real
    options (all, if None). Options as the encoder reads them.

    Raises:
        InputError: NaN or infinity among the real options, shapes that do not fit, a mask not bool.
    """
    real = torch.ones(rejected.shape[:-1], dtype=torch.bool) if mask is None else mask
    try:
        check_choices(chosen[None], rejected[None], real[None], encoder.config.option_dim)
    except (ValueError, TypeError) as error:
        raise InputError(f"choices: {error}") from error
    if not torch.isfinite(chosen).all() or not torch.isfinite(rejected[real]).all():
        raise InputError("choices: expected finite options, got NaN or infinity")
    return _extended(encoder, belief, chosen, rejected, real)


def learn_choices(
    conditioning: Conditioning, model: LanguageModel, belief: Belief, choices: Sequence[ChoiceLike]
) -> Belief:
    """The belief after more choices between texts; only their options are read by the model.

    Raises:
        InputError: as `checked_choices` does; an option longer than the model's context.
    """
    return result_of(learning_steps(conditioning, model, belief, checked_choices(choices)))


def learning_steps(
    conditioning: Conditioning,
    model: LanguageModel,
    belief: Belief,
    choices: Sequence[Choice],
    max_tokens: int = MAX_BATCH_TOKENS,
) -> Steps[Belief]:
    """As `learn_choices`, ``max_tokens`` tokens of the options at a time; choices are checked."""
    if not choices:  # whatever the embeddings are of
        return belief
    options = options_of(choices)
    embedded = yield from embedding_steps(model, conditioning.embedding, options, max_tokens)
    return update_belief(conditioning.encoder, belief, *arranged(choices, embedded))


def _extended(
    encoder: PreferenceEncoder,
    belief: Belief | None,
    chosen: Tensor,
    rejected: Tensor,
    mask: Tensor,
) -> Belief:
    if encoder.config.aggregate == "attention":
        options = (chosen, rejected, mask)
        if belief is not None and belief._options is not None:
            options = _appended(belief._options, options)
        latent = encoder(*(part[None] for part in options))
        return _belief(latent, len(options[0]), None, options)
    summary = encoder.summarise(chosen[None], rejected[None], mask[None])
    if belief is not None and belief._summary is not None:
        summary = belief._summary.merge(summary)
    return _belief(encoder.latent_from_summary(summary), int(summary.count), summary, None)


def _belief(
    latent: Latent,
    count: int,
    summary: ContextSummary | None,
    options: tuple[Tensor, Tensor, Tensor] | None,
) -> Belief:
    std = None if latent.log_std is None else latent.log_std[0].exp()
    return Belief(latent.mean[0], std, count, summary, options)


def _appended(
    before: tuple[Tensor, Tensor, Tensor], new: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Old choices followed by new ones, in the wider of the two forms."""
    if before[1].ndim == new[1].ndim == 2:
        chosen, rejected, mask = (torch.cat(both) for both in zip(before, new, strict=True))
        return chosen, rejected, mask
    parts = [_as_several(*part) for part in (before, new)]
    width = max(part[2].shape[1] for part in parts)
    all_rejected, masks = [], []
    for _, options, mask in parts:
        missing = width - mask.shape[1]
        all_rejected.append(torch.nn.functional.pad(options, (0, 0, 0, missing)))
        masks.append(torch.nn.functional.pad(mask, (0, missing)))
    return torch.cat([part[0] for part in parts]), torch.cat(all_rejected), torch.cat(masks)


def _as_several(chosen: Tensor, rejected: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if rejected.ndim == 3:
        return chosen, rejected, mask
    return chosen, rejected[:, None], mask[:, None]
