"""NP-DPO: teach a modulator to make the base model write what a user's choices ask for.

    z = encoder(context choices)            row = modulator(z)
    r(y) = β ( log π(ỹ | x, z) − log π_ref(ỹ | x) )
    loss = − mean log p(chosen)                         over targets not among the context
           + λ · mean( −log π(chosen | x, z) / tokens of chosen )
           − μ · mean log σ( r(chosen) − r(loop) )

p is Luce's rule over the options of a choice, exp r(y) / Σ exp r(y'); between two it is
σ( r(chosen) − r(rejected) ), and the first term DPO's loss. Differences alone are also won by text
that is no longer good, such as a list that goes "1. 1. 1.". The second term (λ = ``nll_weight``)
holds the policy to text somebody chose; in the third (μ = ``loop_weight``) every user prefers a
chosen answer to the same going round in circles. The base is frozen; log π_ref and the options'
embeddings are computed once and kept beside the run. Sources: arXiv 2412.13998, NP-DPO; arXiv
2404.19733 for the second term; the third is this project's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..conditioning.checkpoint import Conditioning
from ..conditioning.encoder import EncoderConfig, EncoderSettings, Latent, PreferenceEncoder
from ..conditioning.modulator import Modulator
from ..env import process
from ..errors import InputError
from ..models.decoder import Decoder
from ..models.language_model import LanguageModel
from ..models.packed import PackedOptions
from .data import PreferenceData, Split, read_preferences, rows_of_mode, split_preferences
from .evaluation import Batch, Scores, evaluate, spread
from .losses import implicit_reward, luce_log_probs
from .policy_options import Options, answer_logprobs, prepare_options
from .policy_recipe import ONLY_DETERMINISTIC, PolicyConfig
from .progress import counted
from .prompted import prompted_scores
from .reward_model import load_reward
from .tasks import EVALUATION, TaskDataset, TooFewChoicesError, collate_rows
from .trainer import FitResult, fit, forget_metrics, write_metrics

OPTIONS_FILE = "options.safetensors"
CONDITIONING_DIR = "conditioning"
SCALING_TASKS = 256


class PolicyObjective(nn.Module):
    """NP-DPO's loss on rows of the preference data; trains what it registers.

    The frozen base and the options' tensors are kept out of the module's registry: they belong in
    no checkpoint.
    """

    def __init__(
        self,
        encoder: PreferenceEncoder,
        modulator: Modulator,
        decoder: Decoder,
        options: Options,
        *,
        beta: float,
        nll_weight: float = 0.0,
        loop_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.modulator = modulator
        self.beta = beta
        self.nll_weight = nll_weight
        self.loop_weight = loop_weight
        self._base = (decoder, options)

    def forward(
        self,
        context_rows: torch.Tensor,
        context_mask: torch.Tensor,
        target_rows: torch.Tensor,
        target_mask: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Rows ``[U, n]`` and ``[U, m]`` as `tasks.collate_rows` makes them."""
        found = self._logprobs(
            context_rows, context_mask, target_rows, target_mask, with_loops=self.loop_weight > 0
        )
        rewards = implicit_reward(found.policy, found.reference, beta=self.beta)
        chosen, rejected = rewards[:, 0], rewards[:, 1 : 1 + found.real.shape[1]]
        loss = -luce_log_probs(chosen, rejected, found.real)[:, 0].mean()
        nll = -(found.policy[:, 0] / self._chosen_lengths(target_rows, target_mask)).mean()
        loss = loss + self.nll_weight * nll
        if self.loop_weight:
            loss = loss - self.loop_weight * F.logsigmoid(chosen - rewards[:, -1]).mean()
        with torch.no_grad():
            margin = chosen - rejected.masked_fill(~found.real, -torch.inf).amax(1)
            accuracy = (margin > 0).float().mean()
        return {
            "loss": loss,
            "accuracy": accuracy,
            "margin": margin.mean(),
            "nll_per_token": nll.detach(),
        }

    def _chosen_lengths(self, target_rows: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        """Tokens of every real target's chosen answer ``[M]``."""
        decoder, options = self._base
        chosen = options.chosen[target_rows.cpu()[target_mask.cpu()]]
        lengths = [len(options.tokens[i][1]) for i in chosen.tolist()]
        return torch.tensor(lengths, device=decoder.device)

    def choice_log_probs(
        self,
        context_rows: torch.Tensor,
        context_mask: torch.Tensor,
        target_rows: torch.Tensor,
        target_mask: torch.Tensor,
    ) -> torch.Tensor:
        """log p of every option of the M real targets by the implicit reward: ``[M, 1 + R]``, the
        chosen one first and -inf where there is no option."""
        found = self._logprobs(
            context_rows, context_mask, target_rows, target_mask, with_loops=False
        )
        rewards = implicit_reward(found.policy, found.reference, beta=self.beta)
        return luce_log_probs(rewards[:, 0], rewards[:, 1:], found.real)

    def latent(self, context_rows: torch.Tensor, context_mask: torch.Tensor) -> Latent:
        """What the encoder makes of each user's context."""
        decoder, options = self._base
        parts = options.embedded_choices(context_rows.cpu(), context_mask.cpu())
        return self.encoder(*(part.to(decoder.device) for part in parts))

    def _logprobs(
        self,
        context_rows: torch.Tensor,
        context_mask: torch.Tensor,
        target_rows: torch.Tensor,
        target_mask: torch.Tensor,
        *,
        with_loops: bool,
    ) -> _LogProbs:
        decoder, options = self._base
        device = decoder.device
        latent = self.latent(context_rows, context_mask)
        generated = self.modulator.rows(latent.mean)
        mask = target_mask.cpu()
        rows = target_rows.cpu()[mask]
        users = mask.nonzero()[:, 0]
        chosen, rejected, real = options.chosen[rows], options.rejected[rows], options.real[rows]
        texts = []
        for one, others, there in zip(chosen.tolist(), rejected.tolist(), real, strict=True):
            prompt, answer = options.tokens[one]
            texts.append((prompt, [answer]))
            texts[-1][1].extend(options.tokens[other][1] for other in compress(others, there))
            if with_loops:
                texts[-1][1].append(options.loops[one][1])
        packed = PackedOptions.pack_texts(texts, device)
        slots = packed.per_token(users.to(device)).to(torch.int32)
        modulation = self.modulator.bind(generated, slots)
        values = answer_logprobs(decoder, packed, modulation)
        one = torch.ones(len(rows), 1, dtype=torch.bool)
        there = torch.cat([one, real, one] if with_loops else [one, real], 1).to(device)
        policy = values.new_zeros(there.shape).masked_scatter(there, values)
        reference = [options.reference[chosen][:, None], options.reference[rejected]]
        if with_loops:
            reference.append(options.loop_reference[chosen][:, None])
        return _LogProbs(policy, torch.cat(reference, 1).to(device), real.to(device))


class _LogProbs(NamedTuple):
    """log π and log π_ref ``[M, 1 + R]`` of the options of M targets: of the chosen, of those
    rejected that are ``real [M, R]`` (numbers without meaning elsewhere), and, if asked for, in
    one more column of the chosen one's loop."""

    policy: torch.Tensor
    reference: torch.Tensor
    real: torch.Tensor


@dataclass(frozen=True)
class PolicyResult:
    """A trained conditioning, on the CPU, and what the run did (both None where nothing is
    trained), and what was measured (by the main one of several processes, empty elsewhere)."""

    conditioning: Conditioning | None
    metrics: dict[str, Any]
    fit: FitResult | None


def train_policy(config: PolicyConfig, model: LanguageModel) -> PolicyResult:
    """Train a conditioning by ``config`` on ``model``, write it, evaluate it, write that too.

    Files in ``train.output_dir``: ``conditioning/`` (the checkpoint), ``metrics.json``,
    ``options.safetensors`` (the cache, if it is kept there) and the trainer's checkpoints. With
    method "prompt" there are only metrics.

    Raises:
        InputError, ValueError: data, settings or initial encoder that do not fit.
    """
    data = read_preferences(config.data.files)
    split = split_preferences(
        data,
        heldout_users=config.data.heldout_users,
        heldout_prompts=config.data.heldout_prompts,
        seed=config.data.split_seed,
    )
    folder = config.train.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    if config.method == "prompt":
        heldout = _evaluate(config, data, split, prompted_scores(model, data, config.beta))
        return PolicyResult(None, _write_metrics(config, folder, heldout, None), None)
    cache = config.options_file or folder / OPTIONS_FILE
    options = prepare_options(model, config.embedding, data, cache)
    torch.manual_seed(config.train.seed)
    rows = rows_of_mode(data, split.train, config.data.mode)
    tasks = TaskDataset(
        data,
        rows,
        config.tasks,
        num_tasks=config.train.num_tasks,
        seed=config.train.seed,
    )
    tasks.say_who_is_left_out()
    assert config.modulator is not None
    encoder = _initial_encoder(config, config.modulator.latent_dim, options, rows)
    modulator = Modulator(config.modulator, model.decoder.config)
    encoder.requires_grad_(not config.freeze_encoder)
    if config.nobody_is_base:
        encoder.centre_latents()
        # The row of z = 0 is the bias alone, which begins as the identity.
        encoder.prior.requires_grad_(False)
        modulator.expand_bias.requires_grad_(False)
    if config.init_encoder is not None:
        _scale_latents(encoder, options, tasks)
    objective = PolicyObjective(
        encoder,
        modulator,
        model.decoder,
        options,
        beta=config.beta,
        nll_weight=config.nll_weight,
        loop_weight=config.loop_weight,
    )
    outcome = fit(objective, tasks, config.train, collate=collate_rows, recipe=config.decisive())
    modulator.weaken(config.strength)
    conditioning = Conditioning(
        encoder.eval(), modulator.eval(), config.embedding, config.model, model.fingerprint
    )
    dtype = getattr(torch, config.save_dtype)
    conditioning.round_(dtype)
    metrics: dict[str, Any] = {}
    if process().is_main:
        forget_metrics(folder)
        checkpoint = folder / CONDITIONING_DIR
        conditioning.save(checkpoint, dtype=dtype)  # before it is measured, which may fail
        heldout = evaluate_policy(objective, data, split, config)
        conditioning.notes = {
            "heldout": [
                {"n": int(n), "accuracy": entry["accuracy"], "standard_error": entry["accuracy_se"]}
                for n, entry in heldout["contexts"].items()
            ]
        }
        conditioning.save(checkpoint, dtype=dtype)  # the same weights, with the notes
        metrics = _write_metrics(config, folder, heldout, outcome.seconds)
    for part in (encoder, modulator):
        part.cpu()  # where the options of new choices are, and where one that is loaded lies
    return PolicyResult(conditioning, metrics, outcome)


def evaluate_policy(
    objective: PolicyObjective, data: PreferenceData, split: Split, config: PolicyConfig
) -> dict[str, Any]:
    """How well the implicit reward predicts held-out choices (new users, new prompts).

    As `evaluation.evaluate` gives it, for each number of context choices that some held-out user
    has.
    """
    objective.eval()

    def score(batch: Batch) -> Scores:
        found = objective.choice_log_probs(**batch).cpu()
        latent = objective.latent(batch["context_rows"], batch["context_mask"])
        return Scores(spread(found, batch["target_mask"]), latent.mean)

    return _evaluate(config, data, split, score)


def _evaluate(
    config: PolicyConfig, data: PreferenceData, split: Split, score: Callable[[Batch], Scores]
) -> dict[str, Any]:
    settings = config.evaluation
    rows = rows_of_mode(data, split.heldout, config.data.mode)
    tasks: dict[int, TaskDataset] = {}
    for n in settings.contexts:
        wanted = config.tasks.with_context(n).model_copy(
            update={"num_targets": settings.num_targets}
        )
        try:
            tasks[n] = TaskDataset(
                data,
                rows,
                wanted,
                num_tasks=settings.num_tasks,
                seed=config.train.seed,
                stream=EVALUATION,
            )
        except TooFewChoicesError:
            continue  # nobody has so many: said by its absence, not invented
    if not tasks:
        raise InputError(f"evaluation.contexts: nobody made {min(settings.contexts)} choices")
    with counted("measuring on new people", sum(map(len, tasks.values()))) as count:
        return evaluate(
            score, tasks, collate=collate_rows, batch_size=settings.batch_size, progress=count
        )


def _write_metrics(
    config: PolicyConfig, folder: Path, heldout: dict[str, Any], seconds: float | None
) -> dict[str, Any]:
    metrics = {
        "recipe": config.model_dump(mode="json"),
        "train_seconds": seconds,
        "heldout": heldout,
    }
    write_metrics(folder, metrics)
    return metrics


def _initial_encoder(
    config: PolicyConfig, latent_dim: int, options: Options, rows: np.ndarray
) -> PreferenceEncoder:
    option_dim = options.embeddings.shape[1]
    if config.init_encoder is None:
        settings = config.encoder or EncoderSettings(latent_dim=latent_dim)
        encoder = PreferenceEncoder(EncoderConfig(option_dim=option_dim, **settings.model_dump()))
        if config.method == "dpo":
            # The latent of everybody. From zero, where a user nobody knows begins, neither the
            # modulator's own weights nor B would ever move: each waits for the other.
            nn.init.ones_(encoder.prior)
        encoder.scaler.fit(options.embeddings[options.used_by(torch.from_numpy(rows))])
    else:
        reward_encoder = load_reward(config.init_encoder).encoder
        if reward_encoder is None:
            raise InputError(f"init_encoder {config.init_encoder}: the reward has no encoder")
        if config.encoder is not None:
            raise InputError("encoder: expected none beside init_encoder, which brings its own")
        if reward_encoder.config.stochastic:
            raise InputError(
                f"init_encoder {config.init_encoder}: expected a deterministic encoder, "
                f"{ONLY_DETERMINISTIC}"
            )
        encoder = reward_encoder
    found = (encoder.config.option_dim, encoder.config.latent_dim)
    if found != (option_dim, latent_dim):
        raise InputError(
            f"encoder: expected option_dim {option_dim} and latent_dim {latent_dim}, got {found}"
        )
    return encoder


@torch.no_grad()
def _scale_latents(encoder: PreferenceEncoder, options: Options, tasks: TaskDataset) -> None:
    """Divide the encoder's latents by their root mean square over training tasks.

    A reward leaves its latents at whatever size suited it (here about 5), and the modulator's
    steps, being proportional to them, would be as many times too long. One number for all
    dimensions keeps their geometry.
    """
    batch = collate_rows([tasks[i] for i in range(min(SCALING_TASKS, len(tasks)))])
    context = options.embedded_choices(batch["context_rows"], batch["context_mask"])
    scale = encoder(*context).mean.square().mean().sqrt()
    encoder.scale_latents(1 / float(scale))
