"""Losses of METHOD.md section 3.

Everything is reduced in float32 whatever the dtype of the inputs, is differentiable, and takes
padding through boolean masks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def luce_log_probs(
    reward_chosen: Tensor, reward_rejected: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Luce's rule: log-probability of every option of a choice, the chosen one first.

        log p(y_k) = r(y_k) - log Σ_l exp r(y_l),   l over the chosen and the real rejected options

    reward_chosen [...]; reward_rejected [...] (pairs) or [..., R]; mask: bool of the shape of
    reward_rejected, True for a real option (all, if None). Returns float32 [..., 1 + R] (R = 1 for
    pairs), -inf where there is no option; a choice without a rejected option gets probability 1.
    Two options: log σ(±(r_chosen - r_rejected)). ValueError when the shapes do not fit.
    """
    _check_same_shape(reward_rejected, ("mask", mask))
    if reward_rejected.shape == reward_chosen.shape:
        reward_rejected = reward_rejected[..., None]
        mask = None if mask is None else mask[..., None]
    if reward_rejected.shape[:-1] != reward_chosen.shape:
        raise ValueError(
            f"reward_rejected: expected {tuple(reward_chosen.shape)} or one more dimension, got "
            f"{tuple(reward_rejected.shape)}"
        )
    # Relative to the chosen option, whose own reward then is 0: the softmax of large rewards would
    # lose the small differences.
    margin = reward_rejected.float() - reward_chosen.float()[..., None]
    if mask is not None:
        margin = margin.masked_fill(~mask, -torch.inf)
    return torch.log_softmax(torch.cat([torch.zeros_like(margin[..., :1]), margin], -1), dim=-1)


def choice_loss(log_prob_chosen: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood averaged over the real choices: mean_j -log p(chosen_j).

    log_prob_chosen, mask: [U, m]. Where the mask is False NaN has no influence. A float32 scalar,
    0 with no choice at all.
    """
    _check_same_shape(log_prob_chosen, ("mask", mask))
    return -log_prob_chosen.float().masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def marginal_choice_loss(log_prob_chosen: Tensor, mask: Tensor) -> Tensor:
    """Negative log of the marginal likelihood of a user's choices together, per choice.

        loss = Σ_u -log( 1/S Σ_s Π_j p(chosen_uj | z_us) ) / Σ_u m_u,    z_us ~ q(z | context of u)

    log_prob_chosen [U, S, m]; mask [U, m] bool. Its optimum is the posterior predictive of all of
    a user's choices jointly: with S = 1 it is `choice_loss`, and as S grows it approaches (from
    above, in expectation) the likelihood a mixed logit maximises. Returns a float32 scalar.
    ValueError when the shapes do not fit.
    """
    _check_samples(log_prob_chosen, mask)
    joint = log_prob_chosen.float().masked_fill(~mask[:, None], 0.0).sum(dim=2)
    log_marginal = torch.logsumexp(joint, dim=1) - math.log(joint.shape[1])
    return -log_marginal.sum() / mask.sum().clamp(min=1)


def predictive_choice_loss(log_prob_chosen: Tensor, mask: Tensor) -> Tensor:
    """Negative log of the predictive probability of each choice by itself, averaged.

        loss = mean_j -log( 1/S Σ_s p(chosen_uj | z_us) ),    z_us ~ q(z | context of u)

    Arguments and errors as for `marginal_choice_loss`. Its optimum is the best prediction of one
    choice at a time, whether or not one latent explains all of a user's choices.
    """
    _check_samples(log_prob_chosen, mask)
    log_prob = torch.logsumexp(log_prob_chosen.float(), dim=1) - math.log(log_prob_chosen.shape[1])
    return choice_loss(log_prob, mask)


def gaussian_reward_log_probs(
    chosen: tuple[Tensor, Tensor], rejected: tuple[Tensor, Tensor]
) -> Tensor:
    """Distributional preference learning, mean and variance: the rewards are Gaussian.

        p(a > b) = Φ( (μ_a - μ_b) / sqrt(σ_a² + σ_b²) )

    chosen, rejected: (μ, log σ), all of one shape [...]. Returns float32 [..., 2]: log p of the
    chosen and of the rejected option. Source: Siththaranjan, Laidlaw, Hadfield-Menell,
    arXiv 2312.08358.
    """
    (mean_a, log_std_a), (mean_b, log_std_b) = chosen, rejected
    _check_same_shape(
        mean_a, ("log_std_a", log_std_a), ("mean_b", mean_b), ("log_std_b", log_std_b)
    )
    log_variance = torch.logaddexp(2 * log_std_a.float(), 2 * log_std_b.float())
    margin = (mean_a.float() - mean_b.float()) * torch.exp(-0.5 * log_variance)
    return torch.stack([torch.special.log_ndtr(margin), torch.special.log_ndtr(-margin)], dim=-1)


def kl_diagonal_gaussians(
    mean_q: Tensor, log_std_q: Tensor, mean_p: Tensor, log_std_p: Tensor
) -> Tensor:
    """KL[ N(mean_q, diag(std_q²)) || N(mean_p, diag(std_p²)) ] in nats.

        KL = Σ_z  log(std_p/std_q) + (std_q² + (mean_q - mean_p)²) / (2 std_p²) - ½

    All [..., Z] of one shape; returns [...] float32. ValueError when the shapes differ.
    """
    _check_same_shape(
        mean_q, ("log_std_q", log_std_q), ("mean_p", mean_p), ("log_std_p", log_std_p)
    )
    log_ratio = log_std_q.float() - log_std_p.float()
    shift = (mean_q.float() - mean_p.float()) * torch.exp(-log_std_p.float())
    return (0.5 * (torch.exp(2 * log_ratio) + shift.square() - 1) - log_ratio).sum(dim=-1)


def implicit_reward(policy_logprob: Tensor, reference_logprob: Tensor, *, beta: float) -> Tensor:
    """r(y) = beta · ( log π(ỹ | x, z) - log π_ref(ỹ | x) ), float32, shape of the inputs.

    Log-probabilities are of whole answers. With `luce_log_probs` this makes the loss of (NP-)DPO.
    """
    _check_same_shape(policy_logprob, ("reference_logprob", reference_logprob))
    return beta * (policy_logprob.float() - reference_logprob.float())


def _check_samples(log_prob_chosen: Tensor, mask: Tensor) -> None:
    if log_prob_chosen.ndim != 3 or mask.shape != log_prob_chosen[:, 0].shape:
        raise ValueError(
            f"mask: expected [U, m] for log_prob_chosen [U, S, m] "
            f"{tuple(log_prob_chosen.shape)}, got {tuple(mask.shape)}"
        )


def _check_same_shape(first: Tensor, *others: tuple[str, Tensor | None]) -> None:
    for name, value in others:
        if value is not None and value.shape != first.shape:
            raise ValueError(f"{name}: expected {tuple(first.shape)}, got {tuple(value.shape)}")
