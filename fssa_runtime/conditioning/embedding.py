"""e(·): an option (prompt and completion) as a vector, read off the base model's hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from ..models.language_model import Content, LanguageModel
from ..models.packed import PackedOptions, batches_by_tokens

# Tokens of one forward pass: bounds the memory of embedding many answers.
MAX_BATCH_TOKENS = 4096


class EmbeddingConfig(BaseModel):
    """What is taken from the final hidden states ``[T, C]``.

    ``last``: of the completion's last token (the paper's choice). ``mean``: their mean over the
    completion. ``mean_last``: both, side by side.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pooling: Literal["last", "mean", "mean_last"] = "mean_last"

    def width(self, hidden_size: int) -> int:
        """E, the length of an embedding."""
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
        InputError: an option longer than the model's context.
    """
    embeddings = torch.empty(len(options), config.width(model.decoder.config.hidden_size))
    encoded = [model.option_tokens(prompt, completion) for prompt, completion in options]
    lengths = [len(prompt) + len(answer) for prompt, answer in encoded]
    for batch in batches_by_tokens(lengths, MAX_BATCH_TOKENS):
        packed = PackedOptions.pack([encoded[i] for i in batch], model.decoder.device)
        embeddings[batch] = pool(config, packed, packed.hidden(model.decoder)).cpu()
        if on_done is not None:
            on_done(len(batch))
    return embeddings


def pool(config: EmbeddingConfig, packed: PackedOptions, hidden: torch.Tensor) -> torch.Tensor:
    """Embeddings ``[m, E]`` float32 from the final hidden states ``[T, C]`` of packed options."""
    hidden = hidden.float()
    parts = []
    if config.pooling in ("mean", "mean_last"):
        index, owner = packed.answer_index()
        total = hidden.new_zeros(len(packed.lengths), hidden.shape[1])
        total.index_add_(0, owner, hidden[index])
        parts.append(total / torch.tensor(packed.answer_lengths, device=hidden.device)[:, None])
    if config.pooling in ("last", "mean_last"):
        last = torch.tensor(packed.lengths, device=hidden.device).cumsum(0) - 1
        parts.append(hidden[last])
    return torch.cat(parts, dim=-1)
