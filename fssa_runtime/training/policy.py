"""NP-DPO: teach a modulator to make the base model write what a user's choices ask for.

    z = encoder(context choices)            row = modulator(z)
    r(y) = β ( log π(ỹ | x, z) − log π_ref(ỹ | x) )
    loss = − mean log σ( r(chosen) − r(rejected) )      over targets not among the context
           + λ · mean( −log π(chosen | x, z) / tokens of chosen )
           − μ · mean log σ( r(chosen) − r(loop) )

Differences alone are also won by text that is no longer good, such as a list that goes "1. 1. 1.".
The second term (λ = ``nll_weight``) holds the policy to text somebody chose; in the third (μ =
``loop_weight``) every user prefers a chosen answer to the same going round in circles. The base is
frozen; log π_ref and the options' embeddings are computed once and kept beside the run. Sources:
arXiv 2412.13998, NP-DPO; arXiv 2404.19733 for the second term; the third is this project's.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from ..conditioning.checkpoint import Conditioning
from ..conditioning.embedding import EmbeddingConfig, pool
from ..conditioning.encoder import EncoderConfig, EncoderSettings, PreferenceEncoder
from ..conditioning.layout import ModulatorConfig
from ..conditioning.modulation import Modulation
from ..conditioning.modulator import Modulator
from ..errors import InputError
from ..files import write_atomically
from ..models.decoder import Decoder
from ..models.language_model import Content, LanguageModel
from ..models.packed import PackedOptions, batches_by_tokens
from .data import PreferenceData, Split, read_preferences, split_preferences
from .losses import dpo_loss, implicit_reward, token_logprob_from_hidden
from .reward import PreferenceFiles
from .reward_model import load_reward
from .tasks import EVALUATION, Task, TaskConfig, TaskDataset, TooFewChoicesError, collate_rows
from .trainer import FitResult, TrainSettings, fit

OPTIONS_FILE = "options.safetensors"
METRICS_FILE = "metrics.json"
CONDITIONING_DIR = "conditioning"
MAX_BATCH_TOKENS = 4096
SCALING_TASKS = 256
MAX_LOOP_SPAN = 12
LOOP_TOKENS = 48


class PolicyEvaluation(BaseModel):
    """Implicit-reward accuracy on held-out users and prompts, after training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    contexts: tuple[int, ...] = (0, 1, 3, 5, 10)
    num_tasks: int = Field(default=100, ge=2)
    num_targets: int = Field(default=2, ge=1)
    batch_size: int = Field(default=8, ge=1)


class PolicyConfig(BaseModel):
    """A recipe for `train_policy`, read from YAML.

    ``encoder`` starts from random weights, or from ``init_encoder``: the folder of a reward
    trained by ``fssa train reward`` on the same embedding. ``freeze_encoder`` leaves it as it is.
    After training the users' rows are moved towards the identity by ``strength`` (1: not at all):
    preference optimisation overshoots, and text that goes too far is no longer good text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    data: PreferenceFiles
    tasks: TaskConfig = TaskConfig(context_min=0, context_max=6, num_targets=8)
    embedding: EmbeddingConfig = EmbeddingConfig()
    encoder: EncoderSettings | None = None
    init_encoder: Path | None = None
    freeze_encoder: bool = False
    modulator: ModulatorConfig
    beta: float = Field(default=0.05, gt=0)
    nll_weight: float = Field(default=0.0, ge=0)
    loop_weight: float = Field(default=0.0, ge=0)
    strength: float = Field(default=1.0, gt=0, le=1)
    train: TrainSettings
    evaluation: PolicyEvaluation = PolicyEvaluation()
    save_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class Options:
    """Distinct options of a data set, computed once under the unmodulated model.

    ``tokens[i]``: prompt and answer tokens; ``embeddings [m, E]`` float32; ``reference [m]``:
    log π_ref of the answer, nats. ``loops[i]``, ``loop_reference [m]``: the same prompt answered by
    option i's loop (`loop_of`). ``chosen``, ``rejected [N]``: each preference's options.
    """

    tokens: list[tuple[list[int], list[int]]]
    embeddings: torch.Tensor
    reference: torch.Tensor
    loops: list[tuple[list[int], list[int]]]
    loop_reference: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor


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
        kinds = 3 if self.loop_weight else 2
        policy, reference = self._logprobs(
            context_rows, context_mask, target_rows, target_mask, with_loops=kinds == 3
        )
        chosen, rejected, *loops = policy.chunk(kinds)
        reference_chosen, reference_rejected, *reference_loops = reference.chunk(kinds)
        loss = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=self.beta)
        nll = -(chosen / self._chosen_lengths(target_rows, target_mask)).mean()
        loss = loss + self.nll_weight * nll
        for loop, reference_loop in zip(loops, reference_loops, strict=True):
            term = dpo_loss(chosen, loop, reference_chosen, reference_loop, beta=self.beta)
            loss = loss + self.loop_weight * term
        with torch.no_grad():
            margin = implicit_reward(chosen, reference_chosen, beta=self.beta)
            margin = margin - implicit_reward(rejected, reference_rejected, beta=self.beta)
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

    def logprobs(
        self,
        context_rows: torch.Tensor,
        context_mask: torch.Tensor,
        target_rows: torch.Tensor,
        target_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log π and log π_ref of every real target: ``[2 M]``, chosen first, then rejected."""
        return self._logprobs(
            context_rows, context_mask, target_rows, target_mask, with_loops=False
        )

    def _logprobs(
        self,
        context_rows: torch.Tensor,
        context_mask: torch.Tensor,
        target_rows: torch.Tensor,
        target_mask: torch.Tensor,
        *,
        with_loops: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`logprobs`; with loops ``[3 M]``, the loop of each chosen answer last."""
        decoder, options = self._base
        device = decoder.device
        context = context_rows.cpu()
        latent = self.encoder(
            options.embeddings[options.chosen[context]].to(device),
            options.embeddings[options.rejected[context]].to(device),
            context_mask.to(device),
        )
        generated = self.modulator.rows(latent.rsample() if self.training else latent.mean)
        mask = target_mask.cpu()
        rows = target_rows.cpu()[mask]
        users = mask.nonzero()[:, 0]
        chosen, rejected = options.chosen[rows], options.rejected[rows]
        wanted = torch.cat([chosen, rejected])
        texts = [options.tokens[i] for i in wanted.tolist()]
        reference = options.reference[wanted]
        if with_loops:
            texts += [options.loops[i] for i in chosen.tolist()]
            reference = torch.cat([reference, options.loop_reference[chosen]])
        packed = PackedOptions.pack(texts, device)
        owners = users.repeat(len(texts) // max(1, len(rows)))
        slots = packed.per_token(owners.to(device)).to(torch.int32)
        modulation = self.modulator.bind(generated, slots)
        return answer_logprobs(decoder, packed, modulation), reference.to(device)


def answer_logprobs(
    decoder: Decoder, packed: PackedOptions, modulation: Modulation | None = None
) -> torch.Tensor:
    """log p of each option's answer given its prompt, ``[m]`` float32 nats; differentiable."""
    return _answer_logprobs(decoder, packed, packed.hidden(decoder, modulation))


def _answer_logprobs(decoder: Decoder, packed: PackedOptions, hidden: torch.Tensor) -> torch.Tensor:
    index, owner = packed.answer_index()
    values = token_logprob_from_hidden(hidden[index - 1], packed.tokens[index], decoder.logits)
    return values.new_zeros(len(packed.lengths)).index_add(0, owner, values)


def prepare_options(
    model: LanguageModel, embedding: EmbeddingConfig, data: PreferenceData, cache: Path | None
) -> Options:
    """Embeddings and reference log-probabilities of every distinct option, with progress.

    With ``cache``, what an earlier call wrote for the same base, dtype and options is read.
    """
    index: dict[tuple[Content, Content], int] = {}
    chosen = [index.setdefault((p.prompt, p.chosen), len(index)) for p in data.preferences]
    rejected = [index.setdefault((p.prompt, p.rejected), len(index)) for p in data.preferences]
    options = list(index)
    tokens = [model.option_tokens(prompt, completion) for prompt, completion in options]
    draws = random.Random(0)
    loops = [(prompt, loop_of(answer, draws)) for prompt, answer in tokens]
    described = [model.fingerprint, str(model.decoder.dtype), embedding.pooling, tokens, loops]
    key = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    found = _read_cache(cache, key)
    if found is None:
        found = _measure_options(model, embedding, tokens)
        found["loop_reference"] = _reference_logprobs(model, loops)
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, save(found, metadata={"key": key}))
    return Options(
        tokens,
        found["embeddings"],
        found["reference"],
        loops,
        found["loop_reference"],
        torch.tensor(chosen),
        torch.tensor(rejected),
    )


def loop_of(answer: Sequence[int], draws: random.Random) -> list[int]:
    """An answer that goes round in circles: some first tokens, then a span of them over and over.

    Half of the loops begin with the answer's very first tokens, which is where lists begin to
    repeat their number.
    """
    words = list(answer[:-1]) or list(answer)
    span = draws.randint(1, min(MAX_LOOP_SPAN, len(words)))
    start = 0 if draws.random() < 0.5 else draws.randint(0, len(words) - span)
    start = min(start, LOOP_TOKENS)
    repeated = words[start : start + span]
    times = -(-LOOP_TOKENS // len(repeated))
    return words[:start] + repeated * times


@torch.no_grad()
def _reference_logprobs(
    model: LanguageModel, options: Sequence[tuple[list[int], list[int]]]
) -> torch.Tensor:
    """log π_ref of every option ``[m]``, with progress."""
    reference = torch.empty(len(options))
    lengths = [len(prompt) + len(answer) for prompt, answer in options]
    with Progress() as progress:
        task = progress.add_task("reading their loops", total=len(options))
        for batch in batches_by_tokens(lengths, MAX_BATCH_TOKENS):
            packed = PackedOptions.pack([options[i] for i in batch], model.decoder.device)
            reference[batch] = answer_logprobs(model.decoder, packed).cpu()
            progress.advance(task, len(batch))
    return reference


@torch.no_grad()
def _measure_options(
    model: LanguageModel, embedding: EmbeddingConfig, tokens: list[tuple[list[int], list[int]]]
) -> dict[str, torch.Tensor]:
    """Embedding and log π_ref of every option, from one forward pass."""
    width = embedding.width(model.decoder.config.hidden_size)
    embeddings, reference = torch.empty(len(tokens), width), torch.empty(len(tokens))
    lengths = [len(prompt) + len(answer) for prompt, answer in tokens]
    with Progress() as progress:
        task = progress.add_task("reading the options", total=len(tokens))
        for batch in batches_by_tokens(lengths, MAX_BATCH_TOKENS):
            packed = PackedOptions.pack([tokens[i] for i in batch], model.decoder.device)
            hidden = packed.hidden(model.decoder)
            embeddings[batch] = pool(embedding, packed, hidden).cpu()
            reference[batch] = _answer_logprobs(model.decoder, packed, hidden).cpu()
            progress.advance(task, len(batch))
    return {"embeddings": embeddings, "reference": reference}


@dataclass(frozen=True)
class PolicyResult:
    """A trained conditioning, what was measured, and what the run did."""

    conditioning: Conditioning
    metrics: dict[str, Any]
    fit: FitResult


def train_policy(config: PolicyConfig, model: LanguageModel) -> PolicyResult:
    """Train a conditioning by ``config`` on ``model``, evaluate it, write both.

    Files in ``train.output_dir``: ``conditioning/`` (the checkpoint), ``metrics.json``,
    ``options.safetensors`` (the cache) and the trainer's checkpoints.

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
    options = prepare_options(model, config.embedding, data, folder / OPTIONS_FILE)
    torch.manual_seed(config.train.seed)
    tasks = TaskDataset(
        data,
        split.train,
        config.tasks,
        num_tasks=config.train.num_tasks,
        seed=config.train.seed,
    )
    encoder = _initial_encoder(config, options, split)
    if config.init_encoder is not None:
        _scale_latents(encoder, options, tasks)
    encoder.requires_grad_(not config.freeze_encoder)
    modulator = Modulator(config.modulator, model.decoder.config)
    objective = PolicyObjective(
        encoder,
        modulator,
        model.decoder,
        options,
        beta=config.beta,
        nll_weight=config.nll_weight,
        loop_weight=config.loop_weight,
    )
    outcome = fit(objective, tasks, config.train, collate=collate_rows)
    modulator.weaken(config.strength)
    conditioning = Conditioning(
        encoder.eval(), modulator.eval(), config.embedding, config.model, model.fingerprint
    )
    conditioning.round_(getattr(torch, config.save_dtype))
    metrics = {
        "recipe": config.model_dump(mode="json"),
        "train_seconds": outcome.seconds,
        "heldout": evaluate_policy(objective, data, split, config),
    }
    conditioning.notes = {"heldout": metrics["heldout"]}
    conditioning.save(folder / CONDITIONING_DIR, dtype=getattr(torch, config.save_dtype))
    write_atomically(folder / METRICS_FILE, (json.dumps(metrics, indent=2) + "\n").encode())
    return PolicyResult(conditioning, metrics, outcome)


@torch.no_grad()
def evaluate_policy(
    objective: PolicyObjective, data: PreferenceData, split: Split, config: PolicyConfig
) -> list[dict[str, float | None]]:
    """Share of held-out choices (new users, new prompts) the implicit reward ranks right, for
    each number of context choices, and its standard error over tasks; None where no held-out user
    has that many choices."""
    objective.eval()
    settings = config.evaluation
    results: list[dict[str, float | None]] = []
    for n in settings.contexts:
        wanted = config.tasks.with_context(n).model_copy(
            update={"num_targets": settings.num_targets}
        )
        try:
            tasks = TaskDataset(
                data,
                split.heldout,
                wanted,
                num_tasks=settings.num_tasks,
                seed=config.train.seed,
                stream=EVALUATION,
            )
        except TooFewChoicesError:
            results.append({"n": n, "accuracy": None, "standard_error": None})
            continue
        right: list[torch.Tensor] = []
        for start in range(0, len(tasks), settings.batch_size):
            stop = min(start + settings.batch_size, len(tasks))
            drawn: list[Task] = [tasks[i] for i in range(start, stop)]
            batch = collate_rows(drawn)
            policy, reference = objective.logprobs(**batch)
            chosen, rejected = (policy - reference).chunk(2)
            hits = batch["target_mask"].new_zeros(batch["target_mask"].shape).float()
            hits[batch["target_mask"]] = (chosen > rejected).float().cpu()
            right.append(hits.sum(1) / batch["target_mask"].sum(1))
        share = torch.cat(right)
        error = share.std() / len(share) ** 0.5
        results.append({"n": n, "accuracy": share.mean().item(), "standard_error": error.item()})
    return results


def _initial_encoder(config: PolicyConfig, options: Options, split: Split) -> PreferenceEncoder:
    option_dim = options.embeddings.shape[1]
    latent_dim = config.modulator.latent_dim
    if config.init_encoder is None:
        settings = config.encoder or EncoderSettings(latent_dim=latent_dim)
        encoder = PreferenceEncoder(EncoderConfig(option_dim=option_dim, **settings.model_dump()))
        used = torch.cat([options.chosen[split.train], options.rejected[split.train]]).unique()
        encoder.scaler.fit(options.embeddings[used])
    else:
        reward_encoder = load_reward(config.init_encoder).encoder
        if reward_encoder is None:
            raise InputError(f"init_encoder {config.init_encoder}: the reward has no encoder")
        if config.encoder is not None:
            raise InputError("encoder: expected none beside init_encoder, which brings its own")
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
    rows, mask = batch["context_rows"], batch["context_mask"]
    chosen, rejected = (
        options.embeddings[options.chosen[rows]],
        options.embeddings[options.rejected[rows]],
    )
    scale = encoder(chosen, rejected, mask).mean.square().mean().sqrt()
    encoder.scale_latents(1 / float(scale))


def _read_cache(cache: Path | None, key: str) -> dict[str, torch.Tensor] | None:
    if cache is None or not cache.is_file():
        return None
    with safe_open(str(cache), framework="pt") as file:
        if (file.metadata() or {}).get("key") != key:
            return None
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
