"""The reward r(y | D_C) = g([enc(y), z]): network, predictions and checkpoint (NP-BTL).

METHOD.md section 3. `btl` is the same network without z, one reward for everybody; `dpl` is that
with a Gaussian reward. The losses are in `reward_objective`.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from typing_extensions import Self

from fssa_runtime.conditioning.embedding import EmbeddingConfig
from fssa_runtime.conditioning.encoder import (
    EncoderConfig,
    EncoderSettings,
    Latent,
    OptionScaler,
    PreferenceEncoder,
    bounded_log_std,
    check_choices,
    real_choices,
    two_layer_mlp,
)
from fssa_runtime.errors import InputError
from fssa_runtime.files import write_atomically
from fssa_runtime.training.evaluation import Scores
from fssa_runtime.training.losses import gaussian_reward_log_probs, luce_log_probs

FORMAT_VERSION = 1
WEIGHTS_FILE = "reward_model.safetensors"
CONFIG_FILE = "reward_config.json"


class RewardModelConfig(BaseModel):
    """What a reward checkpoint needs to be rebuilt. Options have size `option_dim` (E); without
    an encoder the model is unconditioned (`btl`). head "linear" weighs the options' own features;
    `gaussian` (`dpl`) gives every option a mean and a scale of its reward instead of a number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    option_dim: int = Field(ge=1)
    hidden_dim: int = Field(default=256, ge=1)
    encoder: EncoderSettings | None = EncoderSettings()
    head: Literal["mlp", "linear"] = "mlp"
    gaussian: bool = False

    @model_validator(mode="after")
    def _gaussian_is_a_baseline(self) -> Self:
        if self.gaussian and (self.encoder is not None or self.head != "mlp"):
            raise ValueError("gaussian: expected false with an encoder or a linear head")
        return self


class TextReading(BaseModel):
    """Whose hidden states a reward on texts was trained on: the base model by name and by the
    fingerprint of its weights, and what was taken of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_model: str
    base_fingerprint: str
    embedding: EmbeddingConfig


class RewardModel(nn.Module):
    """r(y | D_C) with z from a `PreferenceEncoder`, or one reward r(y) for everybody.

    head "mlp": g([enc(y), z]); enc and g are two-layer perceptrons of width `hidden_dim`.
    head "linear": c(z) · y, c a two-layer perceptron (or one vector without an encoder): what the
    options offer is weighed by tastes that depend on z, as in a logit.
    Options are scaled by the encoder's `OptionScaler`, the same for contexts and targets.
    """

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_dim
        if config.head == "mlp":
            self.option_encoder = two_layer_mlp(config.option_dim, hidden, hidden)
            # First layer of g, split: the part that reads z is computed once a user, not once an
            # option.
            self.head_option = nn.Linear(hidden, hidden)
            self.head_out = nn.Linear(hidden, 2 if config.gaussian else 1)
        self.encoder: PreferenceEncoder | None = None
        self.head_latent: nn.Module | None = None
        self.own_scaler: OptionScaler | None = None
        if config.encoder is None:
            self.own_scaler = OptionScaler(config.option_dim)
            if config.head == "linear":
                self.taste = nn.Parameter(torch.zeros(config.option_dim))
            return
        self.encoder = PreferenceEncoder(
            EncoderConfig(option_dim=config.option_dim, **config.encoder.model_dump())
        )
        latent_dim = config.encoder.latent_dim
        if config.head == "mlp":
            self.head_latent = nn.Linear(latent_dim, hidden, bias=False)
        else:
            self.head_latent = two_layer_mlp(latent_dim, hidden, config.option_dim)

    @property
    def scaler(self) -> OptionScaler:
        scaler = self.own_scaler if self.encoder is None else self.encoder.scaler
        assert scaler is not None
        return scaler

    def encode(self, chosen: Tensor, rejected: Tensor, mask: Tensor) -> Latent | None:
        """q(z | D_C) of U users (`PreferenceEncoder.forward`), None without an encoder."""
        return None if self.encoder is None else self.encoder(chosen, rejected, mask)

    def rewards(self, options: Tensor, z: Tensor | None) -> Tensor:
        """r of options [U, m, E] for users with latents z [U, Z] → [U, m], or with several latents
        each, z [U, S, Z] → [U, S, m]. A Gaussian reward is given by its mean.

        z must be None exactly when there is no encoder (ValueError otherwise).
        """
        return self._reward_parameters(options, z)[0]

    def _reward_parameters(self, options: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if (z is None) != (self.head_latent is None):
            raise ValueError(
                f"z: expected {'None' if self.head_latent is None else '[U, Z]'} for this "
                f"model, got {'None' if z is None else tuple(z.shape)}"
            )
        scaled = self.scaler(options)
        of_z = None if z is None or self.head_latent is None else self.head_latent(z)
        if self.config.head == "linear":
            tastes = self.taste.expand(len(options), -1) if of_z is None else of_z
            if tastes.ndim == 2:
                return torch.einsum("ume,ue->um", scaled, tastes), None
            return torch.einsum("ume,use->usm", scaled, tastes), None
        mixed = self.head_option(F.relu(self.option_encoder(scaled)))
        if of_z is not None:
            mixed = mixed if of_z.ndim == 2 else mixed[:, None]
            mixed = mixed + of_z[..., None, :]
        out = self.head_out(F.relu(mixed))
        if not self.config.gaussian:
            return out[..., 0], None
        # Choices only show means in units of the scales, which therefore can have bounds.
        return out[..., 0], bounded_log_std(out[..., 1])

    def forward(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Scores:
        """Probabilities of the targets' options given the contexts; see `tasks.collate_options` for
        the batch. A padded target is a choice among one option.

        noise [S, Z] standard normal, for a stochastic encoder only: the predictive distribution
        p = 1/S Σ_s p(· | z_s), the same noise for every user, so that a user's numbers do not
        depend on their neighbours. Without it z is at its mean. ValueError when it does not fit.
        """
        latent = self.encode(
            batch["context_chosen"], batch["context_rejected"], batch["context_mask"]
        )
        if noise is None:
            mean = None if latent is None else latent.mean
            return Scores(self.target_log_probs(batch, mean), mean)
        if latent is None:
            raise ValueError("noise: expected none for a model without an encoder")
        log_probs = self.target_log_probs(batch, latent.samples(noise))
        mixture = torch.logsumexp(log_probs, dim=1) - math.log(log_probs.shape[1])
        return Scores(mixture, latent.mean)

    def target_log_probs(self, batch: dict[str, Tensor], z: Tensor | None) -> Tensor:
        """log p of the options of every target, the chosen one first: [U, m, K] for z [U, Z] or
        None, [U, S, m, K] for z [U, S, Z]."""
        chosen, rejected = batch["target_chosen"], batch["target_rejected"]
        mask = batch["target_mask"]
        check_choices(chosen, rejected, mask, self.config.option_dim)
        num_users, num_targets, option_dim = chosen.shape
        chosen = chosen.masked_fill(~real_choices(mask)[..., None], 0.0)
        rejected = rejected.masked_fill(~mask[..., None], 0.0)
        options = torch.cat([chosen, rejected.reshape(num_users, -1, option_dim)], dim=1)
        value, log_std = self._reward_parameters(options, z)
        if log_std is not None:
            if mask.ndim == 3:
                raise ValueError(
                    "rejected: expected pairs for a Gaussian reward, got choices among several"
                )
            first, second = value.chunk(2, dim=-1)
            std_first, std_second = log_std.chunk(2, dim=-1)
            return gaussian_reward_log_probs((first, std_first), (second, std_second))
        of_chosen, of_rejected = value[..., :num_targets], value[..., num_targets:]
        real = mask if mask.ndim == 3 else mask[..., None]
        of_rejected = of_rejected.reshape(*of_chosen.shape, real.shape[-1])
        if of_chosen.ndim == 3:
            real = real[:, None]
        return luce_log_probs(of_chosen, of_rejected, real.expand_as(of_rejected))


@dataclass(frozen=True)
class TextReward:
    """A reward with what turns texts into its options: `load_text_reward`, or made of both parts.

    `name` is what errors call it.
    """

    model: RewardModel
    reading: TextReading
    name: str = "reward"


def save_reward(model: RewardModel, folder: str | Path, reading: TextReading | None = None) -> None:
    """Write reward_model.safetensors and reward_config.json; nothing is left half-written.

    The configuration records the hash of the weights, so that files of two different saves are
    never taken for one checkpoint. `reading`: of a reward on texts, for `load_text_reward`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = save({k: v.contiguous().cpu() for k, v in model.state_dict().items()})
    record = {
        "format_version": FORMAT_VERSION,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "model": model.config.model_dump(mode="json"),
    }
    if reading is not None:
        record["reading"] = reading.model_dump(mode="json")
    write_atomically(folder / WEIGHTS_FILE, weights)
    write_atomically(folder / CONFIG_FILE, (json.dumps(record, indent=2) + "\n").encode())


def load_reward(folder: str | Path) -> RewardModel:
    """Read what `save_reward` wrote, every tensor bit for bit, onto the CPU, in eval mode.

    FileNotFoundError when a file is missing; ValueError naming the file when it is corrupt, of
    another format version, or the two do not belong together.
    """
    return _model_of(_read_record(Path(folder) / CONFIG_FILE), Path(folder))


def load_text_reward(folder: str | Path) -> TextReward:
    """A reward that `fssa train reward` trained on texts (data of kind "preferences").

    Raises:
        InputError: what `load_reward` raises, or a reward that says not what texts were read by.
    """
    config_file = Path(folder) / CONFIG_FILE
    try:
        record = _read_record(config_file)
        model = _model_of(record, Path(folder))
    except (ValueError, OSError) as error:
        raise InputError(f"reward {folder}: {error}") from error
    if record.get("reading") is None:
        raise InputError(
            f"{config_file}: field 'reading': expected the base model that texts were read by, got "
            "none; train the reward with `fssa train reward` on data of kind 'preferences'"
        )
    try:
        reading = TextReading.model_validate(record["reading"])
    except ValidationError as error:
        raise InputError(f"{config_file}: field 'reading': {error}") from error
    return TextReward(model, reading, f"reward {folder}")


def _model_of(record: dict[str, Any], folder: Path) -> RewardModel:
    config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
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
