"""The reward r(y | D_C) = g([enc(y), z]): network, training loss and checkpoint (NP-BTL).

METHOD.md section 3. `btl` is the same network without z: one reward for everybody, the baseline.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from fssa_runtime.conditioning.encoder import (
    EncoderConfig,
    EncoderSettings,
    Latent,
    OptionScaler,
    PreferenceEncoder,
    check_pairs,
    two_layer_mlp,
)
from fssa_runtime.files import write_atomically
from fssa_runtime.training.evaluation import Scores
from fssa_runtime.training.losses import btl_loss, kl_diagonal_gaussians

FORMAT_VERSION = 1
WEIGHTS_FILE = "reward_model.safetensors"
CONFIG_FILE = "reward_config.json"


class RewardModelConfig(BaseModel):
    """What a reward checkpoint needs to be rebuilt. Options have size `option_dim` (E); without
    an encoder the model is unconditioned (`btl`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    option_dim: int = Field(ge=1)
    hidden_dim: int = Field(default=256, ge=1)
    encoder: EncoderSettings | None = EncoderSettings()


class RewardModel(nn.Module):
    """r(y | D_C) = g([enc(y), z]) with z from a `PreferenceEncoder`, or r(y) = g(enc(y)).

    enc and g are two-layer perceptrons of width `hidden_dim`. Options are scaled by the
    encoder's `OptionScaler`, the same for contexts and targets.
    """

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_dim
        self.option_encoder = two_layer_mlp(config.option_dim, hidden, hidden)
        # First layer of g, split: the part that reads z is computed once a user, not once an
        # option.
        self.head_option = nn.Linear(hidden, hidden)
        self.head_out = nn.Linear(hidden, 1)
        self.encoder: PreferenceEncoder | None = None
        self.head_latent: nn.Linear | None = None
        self.own_scaler: OptionScaler | None = None
        if config.encoder is None:
            self.own_scaler = OptionScaler(config.option_dim)
        else:
            self.encoder = PreferenceEncoder(
                EncoderConfig(option_dim=config.option_dim, **config.encoder.model_dump())
            )
            self.head_latent = nn.Linear(config.encoder.latent_dim, hidden, bias=False)

    @property
    def scaler(self) -> OptionScaler:
        scaler = self.own_scaler if self.encoder is None else self.encoder.scaler
        assert scaler is not None
        return scaler

    def encode(self, chosen: Tensor, rejected: Tensor, mask: Tensor) -> Latent | None:
        """q(z | D_C) of U users (`PreferenceEncoder.forward`), None without an encoder."""
        return None if self.encoder is None else self.encoder(chosen, rejected, mask)

    def rewards(self, options: Tensor, z: Tensor | None) -> Tensor:
        """r of options [U, m, E] for users with latents z [U, Z] → [U, m].

        z must be None exactly when there is no encoder (ValueError otherwise).
        """
        if (z is None) != (self.head_latent is None):
            raise ValueError(
                f"z: expected {'None' if self.head_latent is None else '[U, Z]'} for this "
                f"model, got {'None' if z is None else tuple(z.shape)}"
            )
        mixed = self.head_option(F.relu(self.option_encoder(self.scaler(options))))
        if z is not None and self.head_latent is not None:
            mixed = mixed + self.head_latent(z)[:, None, :]
        return self.head_out(F.relu(mixed))[..., 0]

    def forward(self, batch: dict[str, Tensor]) -> Scores:
        """Margins of the targets [U, m] given the contexts, z at its mean; see
        `tasks.collate_options` for the batch. Padded targets get arbitrary finite margins."""
        latent = self.encode(
            batch["context_chosen"], batch["context_rejected"], batch["context_mask"]
        )
        z = None if latent is None else latent.mean
        chosen, rejected = self.target_rewards(batch, z)
        return Scores(chosen - rejected, z)

    def target_rewards(self, batch: dict[str, Tensor], z: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rewards of the chosen and of the rejected targets, each [U, m]."""
        mask = batch["target_mask"]
        check_pairs(batch["target_chosen"], batch["target_rejected"], mask, self.config.option_dim)
        options = torch.cat([batch["target_chosen"], batch["target_rejected"]], dim=1)
        padded = ~torch.cat([mask, mask], dim=1)[..., None]
        rewards = self.rewards(options.masked_fill(padded, 0.0), z)
        chosen, rejected = rewards.chunk(2, dim=1)
        return chosen, rejected


class RewardObjective(nn.Module):
    """The training loss of a `RewardModel`.

    Deterministic (and btl):  mean_j -log sigmoid( r(chosen_j | D_C) - r(rejected_j | D_C) ).
    Stochastic: the negative evidence bound per target, with z ~ q(z | D_T) of the m targets,
        mean_j -log sigmoid(...) + kl_weight · mean_U KL[q(z|D_T) || q(z|D_C)] / mean_U m.
    """

    def __init__(self, model: RewardModel, kl_weight: float) -> None:
        super().__init__()
        self.model = model
        self.kl_weight = kl_weight

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
        latent = self.model.encode(context_chosen, context_rejected, context_mask)
        z = None if latent is None else latent.mean
        outputs: dict[str, Tensor] = {}
        kl_per_target = None
        if latent is not None and latent.log_std is not None:
            posterior = self.model.encode(target_chosen, target_rejected, target_mask)
            assert posterior is not None
            assert posterior.log_std is not None
            z = posterior.rsample()
            kl = kl_diagonal_gaussians(
                posterior.mean, posterior.log_std, latent.mean, latent.log_std
            )
            outputs["kl"] = kl.mean()
            kl_per_target = kl.sum() / target_mask.sum()
        chosen, rejected = self.model.target_rewards(batch, z)
        loss = btl_loss(chosen, rejected, target_mask)
        outputs["accuracy"] = ((chosen > rejected) & target_mask).sum() / target_mask.sum()
        outputs["loss"] = loss if kl_per_target is None else loss + self.kl_weight * kl_per_target
        return outputs


def save_reward(model: RewardModel, folder: str | Path) -> None:
    """Write reward_model.safetensors and reward_config.json; nothing is left half-written.

    The configuration records the hash of the weights, so that files of two different saves are
    never taken for one checkpoint.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = save({k: v.contiguous().cpu() for k, v in model.state_dict().items()})
    record = {
        "format_version": FORMAT_VERSION,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "model": model.config.model_dump(mode="json"),
    }
    write_atomically(folder / WEIGHTS_FILE, weights)
    write_atomically(folder / CONFIG_FILE, (json.dumps(record, indent=2) + "\n").encode())


def load_reward(folder: str | Path) -> RewardModel:
    """Read what `save_reward` wrote, every tensor bit for bit, onto the CPU, in eval mode.

    FileNotFoundError when a file is missing; ValueError naming the file when it is corrupt, of
    another format version, or the two do not belong together.
    """
    config_file, weights_file = Path(folder) / CONFIG_FILE, Path(folder) / WEIGHTS_FILE
    record = _read_record(config_file)
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{config_file}: field 'format_version': expected {FORMAT_VERSION}, "
            f"got {record.get('format_version')!r}"
        )
    try:
        config = RewardModelConfig.model_validate(record.get("model"))
    except ValidationError as error:
        raise ValueError(f"{config_file}: field 'model': {error}") from error
    weights = weights_file.read_bytes()
    found = hashlib.sha256(weights).hexdigest()
    if found != record.get("weights_sha256"):
        raise ValueError(
            f"{weights_file}: expected sha256 {record.get('weights_sha256')} as recorded in "
            f"{CONFIG_FILE}, got {found}"
        )
    model = RewardModel(config)
    try:
        model.load_state_dict(load(weights))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{weights_file}: expected the tensors of {CONFIG_FILE}: {error}"
        ) from error
    return model.eval()


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(record).__name__}")
    return record
