"""Everything that is said in a set of preferences: tokens, embeddings, what the base makes of it.

It does not change while a policy is trained, so it is computed once and kept beside the run.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch.nn.utils.rnn import pad_sequence

from ..conditioning.embedding import EmbeddingConfig, pool
from ..conditioning.modulation import Modulation
from ..errors import InputError
from ..files import write_atomically
from ..models.decoder import Decoder
from ..models.language_model import LanguageModel
from ..models.packed import PackedOptions, batches_by_tokens
from .data import Content, PreferenceData
from .logprobs import token_logprob
from .progress import counted

MAX_BATCH_TOKENS = 4096
MAX_LOOP_SPAN = 12
LOOP_TOKENS = 48


@dataclass(frozen=True)
class Options:
    """Distinct options of a data set, computed once under the unmodulated model.

    ``tokens[i]``: prompt and answer tokens; ``embeddings [m, E]`` float32; ``reference [m]``:
    log π_ref of the answer, nats. ``loops[i]``, ``loop_reference [m]``: the same prompt answered by
    option i's loop (`loop_of`). ``chosen [N]``, ``rejected [N, R]``: each preference's options, and
    ``real [N, R]`` bool, which of the rejected there are (others are option 0); R = 1 for pairs.
    """

    tokens: list[tuple[list[int], list[int]]]
    embeddings: torch.Tensor
    reference: torch.Tensor
    loops: list[tuple[list[int], list[int]]]
    loop_reference: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor
    real: torch.Tensor

    def embedded_choices(
        self, rows: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What an encoder reads of preferences ``rows [U, n]`` of which ``mask [U, n]`` are real:
        chosen, rejected and mask, in the form for pairs if all preferences are such."""
        chosen, rejected = self.embeddings[self.chosen[rows]], self.embeddings[self.rejected[rows]]
        if self.rejected.shape[1] == 1:
            return chosen, rejected[:, :, 0], mask
        return chosen, rejected, mask[..., None] & self.real[rows]

    def used_by(self, rows: torch.Tensor) -> torch.Tensor:
        """The options of some preferences, each once."""
        return torch.cat([self.chosen[rows], self.rejected[rows][self.real[rows]]]).unique()


def answer_logprobs(
    decoder: Decoder,
    packed: PackedOptions,
    modulation: Modulation | None = None,
    *,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """log p of each option's answer given its prompt, ``[m]`` float32 nats; differentiable.

    ``starts [m]``: the position from which on an option's tokens count; what is packed as its
    answer may begin with the end of its prompt.
    """
    return _answer_logprobs(decoder, packed, packed.hidden(decoder, modulation), starts)


def _answer_logprobs(
    decoder: Decoder,
    packed: PackedOptions,
    hidden: torch.Tensor,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    index, before, owner = packed.answer_index()
    if starts is not None:
        counts = packed.positions[index] >= starts[owner]
        index, before, owner = index[counts], before[counts], owner[counts]
    values = token_logprob(hidden[before], packed.tokens[index], decoder.logits)
    return values.new_zeros(len(packed.answer_lengths)).index_add(0, owner, values)


def prepare_options(
    model: LanguageModel, embedding: EmbeddingConfig, data: PreferenceData, cache: Path | None
) -> Options:
    """Embeddings and reference log-probabilities of every distinct option, with progress.

    With ``cache``, what an earlier call wrote for the same base, dtype and options is read.

    Raises:
        InputError: an option longer than the model's context, named by its prompt and user.
    """
    index: dict[tuple[Content, Content], int] = {}
    chosen = [index.setdefault((p.prompt, p.chosen), len(index)) for p in data.preferences]
    rejected = [
        torch.tensor(
            [index.setdefault((p.prompt, answer), len(index)) for answer in p.all_rejected]
        )
        for p in data.preferences
    ]
    counts = torch.tensor([len(options) for options in rejected])
    options = list(index)
    tokens = []
    for option in options:
        try:
            tokens.append(model.option_tokens(*option))
        except InputError as error:
            raise InputError(f"{data.whose(*option)}: {error}") from error
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
        pad_sequence(rejected, batch_first=True),
        torch.arange(int(counts.max())) < counts[:, None],
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
    with counted("reading their loops", len(options)) as count:
        for batch in batches_by_tokens(lengths, MAX_BATCH_TOKENS):
            packed = PackedOptions.pack([options[i] for i in batch], model.decoder.device)
            reference[batch] = answer_logprobs(model.decoder, packed).cpu()
            count(len(batch))
    return reference


@torch.no_grad()
def _measure_options(
    model: LanguageModel, embedding: EmbeddingConfig, tokens: list[tuple[list[int], list[int]]]
) -> dict[str, torch.Tensor]:
    """Embedding and log π_ref of every option, from one forward pass."""
    width = embedding.width(model.decoder.config.hidden_size)
    embeddings, reference = torch.empty(len(tokens), width), torch.empty(len(tokens))
    lengths = [len(prompt) + len(answer) for prompt, answer in tokens]
    with counted("reading the options", len(tokens)) as count:
        for batch in batches_by_tokens(lengths, MAX_BATCH_TOKENS):
            packed = PackedOptions.pack([tokens[i] for i in batch], model.decoder.device)
            hidden = packed.hidden(model.decoder)
            embeddings[batch] = pool(embedding, packed, hidden).cpu()
            reference[batch] = _answer_logprobs(model.decoder, packed, hidden).cpu()
            count(len(batch))
    return {"embeddings": embeddings, "reference": reference}


def _read_cache(cache: Path | None, key: str) -> dict[str, torch.Tensor] | None:
    if cache is None or not cache.is_file():
        return None
    with safe_open(str(cache), framework="pt") as file:
        if (file.metadata() or {}).get("key") != key:
            return None
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
