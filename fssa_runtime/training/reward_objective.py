"""Training losses of a reward model, as one module for `trainer.fit`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fssa_runtime.conditioning.encoder import antithetic_noise, real_choices
from fssa_runtime.training.losses import (
    choice_loss,
    kl_diagonal_gaussians,
    marginal_choice_loss,
    predictive_choice_loss,
)
from fssa_runtime.training.reward_model import RewardModel

Objective = Literal["elbo", "marginal", "predictive"]


class RewardObjective(nn.Module):
    """The training loss of a `RewardModel`.

    Deterministic encoder or none:  mean_j -log p(chosen_j | D_C).
    Stochastic, "elbo": the negative evidence bound per target, with z ~ q(z | D_T) of the targets,
        mean_j -log p(chosen_j | z) + kl_weight · mean_U KL[q(z|D_T) || q(z|D_C)] / mean_U m.
    Stochastic, "marginal": `losses.marginal_choice_loss` with num_samples (even) z from q(z | D_C),
    in antithetic pairs. Its optimum is the predictive distribution itself: where the context leaves
    open who somebody is, the samples are some of one kind and some of the other, which no single z
    can express (METHOD.md section 3).
    Stochastic, "predictive": the same with `losses.predictive_choice_loss`, each choice by itself.
    """

    def __init__(
        self,
        model: RewardModel,
        *,
        objective: Objective = "elbo",
        kl_weight: float = 1.0,
        num_samples: int = 16,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.kl_weight = kl_weight
        self.num_samples = num_samples

    def forward(
        self,
        context_chosen: Tensor,
        context_rejected: Tensor,
        context_mask: Tensor,
        target_chosen: Tensor,
        target_rejected: Tensor,
        target_mask: Tensor,
    ) -> dict[str, Tensor]:
        batch = {
            "target_chosen": target_chosen,
            "target_rejected": target_rejected,
            "target_mask": target_mask,
        }
        mask = real_choices(target_mask)
        latent = self.model.encode(context_chosen, context_rejected, context_mask)
        z = None if latent is None else latent.mean
        outputs: dict[str, Tensor] = {}
        if latent is not None and latent.log_std is not None:
            if self.objective != "elbo":
                noise = antithetic_noise(tuple(latent.mean.shape), self.num_samples)
                log_probs = self.model.target_log_probs(
                    batch, latent.samples(noise.to(latent.mean))
                )
                loss_of = (
                    marginal_choice_loss if self.objective == "marginal" else predictive_choice_loss
                )
                outputs["loss"] = loss_of(log_probs[..., 0], mask)
                outputs["accuracy"] = _accuracy(torch.logsumexp(log_probs, dim=1), mask)
                return outputs
            posterior = self.model.encode(target_chosen, target_rejected, target_mask)
            assert posterior is not None
            assert posterior.log_std is not None
            z = posterior.rsample()
            kl = kl_diagonal_gaussians(
                posterior.mean, posterior.log_std, latent.mean, latent.log_std
            )
            outputs["kl"] = kl.mean()
        log_probs = self.model.target_log_probs(batch, z)
        loss = choice_loss(log_probs[..., 0], mask)
        if "kl" in outputs:
            loss = loss + self.kl_weight * kl.sum() / mask.sum()
        outputs["loss"] = loss
        outputs["accuracy"] = _accuracy(log_probs, mask)
        return outputs


def _accuracy(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Share of the real targets [U, m] whose chosen option is the likeliest, ties counting as
    wrong."""
    right = (log_probs[..., :1] > log_probs[..., 1:]).all(dim=-1)
    return (right & mask).sum() / mask.sum()
