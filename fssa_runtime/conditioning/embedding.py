"""e(·): an option (prompt and completion) as a vector, read off the base model's hidden states."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict

from ..errors import InputError
from ..models.language_model import LanguageModel
from ..models.messages import Content
from ..models.packed import PackedOptions, batches_by_tokens

# Tokens of one forward pass: bounds the memory of embedding many answers.
MAX_BATCH_TOKENS = 4096
# Options tokenised at a time: short ones cost more than their tokens say.
MAX_TOKENISED = 16

T = TypeVar("T")
# Work that stops between its parts, so that whoever does it may do something else there.
Steps = Generator[int, None, T]


class EmbeddingConfig(BaseModel):
    """What is taken from the final hidden states ``[T, C]``.

    ``last``: of the completion's last token (the paper's choice). ``mean``: their mean over the
    completion. ``mean_last``: both, side by side.

    ``model`` names the model whose hidden states they are, where it is not the base (imported
    checkpoints). The base cannot give those: options then come as vectors
    (`Conditioning.infer_embedded`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pooling: Literal["last", "mean", "mean_last"] = "mean_last"
    model: str | None = None

    def width(self, hidden_size: int) -> int:
        """E, the length of an embedding read off the base.

        Raises:
            InputError: the embeddings are another model's.
        """
        if self.model is not None:
            raise InputError(
                f"this encoder reads embeddings made by {self.model!r}, not by the base: expected "
                "options as vectors (Conditioning.infer_embedded), got text"
            )
        return hidden_size * (2 if self.pooling == "mean_last" else 1)


@torch.no_grad()
def embed_options(
    model: LanguageModel,
    config: EmbeddingConfig,
    options: Sequence[tuple[Content, Content]],
    *,
    on_done: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """``[m, E]`` float32 embeddings of m (prompt, completion) pairs under the unmodulated model.

    ``on_done`` is told how many more are done.

    Raises:
        InputError: an option longer than the model's context, or an encoder that reads another
            model's embeddings.
    """
    return result_of(embedding_steps(model, config, options), on_done)


@torch.no_grad()
def embedding_steps(
    model: LanguageModel,
    config: EmbeddingConfig,
    options: Sequence[tuple[Content, Content]],
    max_tokens: int = MAX_BATCH_TOKENS,
) -> Steps[torch.Tensor]:
    """As `embed_options`, one forward pass of at most ``max_tokens`` tokens (or one option) at a
    time; gives the number of options that are done after each. They are tokenised in steps, too."""
    embeddings = torch.empty(len(options), config.width(model.decoder.config.hidden_size))
    encoded: list[tuple[list[int], list[int]]] = []
    num_tokens = num_options = 0
    for prompt, completion in options:
        encoded.append(model.option_tokens(prompt, completion))
        num_tokens += sum(map(len, encoded[-1]))
        num_options += 1
        if num_tokens >= max_tokens or num_options == MAX_TOKENISED:
            num_tokens = num_options = 0
            yield 0
    lengths = [len(prompt) + len(answer) for prompt, answer in encoded]
    for batch in batches_by_tokens(lengths, max_tokens):
        packed = PackedOptions.pack([encoded[i] for i in batch], model.decoder.device)
        embeddings[batch] = pool(config, packed, packed.hidden(model.decoder)).cpu()
        yield len(batch)
    return embeddings


def result_of(steps: Steps[T], on_done: Callable[[int], None] | None = None) -> T:
    """Do work that comes in steps all at once; ``on_done`` is told what each step gives."""
    while True:
        try:
            done = next(steps)
        except StopIteration as end:
            return end.value
        if on_done is not None:
            on_done(done)


def pool(config: EmbeddingConfig, packed: PackedOptions, hidden: torch.Tensor) -> torch.Tensor:
    """Embeddings ``[m, E]`` float32 from the final hidden states ``[T, C]`` of packed options."""
    hidden = hidden.float()
    index, _, owner = packed.answer_index()
    lengths = torch.tensor(packed.answer_lengths, device=hidden.device)
    parts = []
    if config.pooling in ("mean", "mean_last"):
        total = hidden.new_zeros(len(lengths), hidden.shape[1])
        parts.append(total.index_add_(0, owner, hidden[index]) / lengths[:, None])
    if config.pooling in ("last", "mean_last"):
        parts.append(hidden[index[lengths.cumsum(0) - 1]])
    return torch.cat(parts, dim=-1)
