"""The baseline without training: a user's choices pasted into the prompt.

    r(y) = β ( log π(ỹ | choices, x) − log π(ỹ | x) )

under the base model, which is how anybody would try it first. Without choices r is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..models.language_model import LanguageModel
from ..models.packed import PackedOptions, batches_by_tokens
from .data import Content, Preference, PreferenceData, as_messages
from .evaluation import Batch, Scores
from .losses import implicit_reward
from .policy_options import MAX_BATCH_TOKENS, answer_logprobs

# A prompt and two answers to it.
Pair = tuple[Any, Content, Content]


def prompt_with_choices(choices: Sequence[Preference], prompt: Content) -> list[dict[str, str]]:
    """Chat messages: what the user chose before, and the prompt; without choices it alone."""
    asked = as_messages(prompt, ())
    if not choices:
        return asked
    shown = "\n\n".join(
        f"Question: {_text(choice.prompt)}\n"
        f"Liked answer: {_text(choice.chosen)}\n"
        f"Disliked answer: {_text(choice.rejected)}"
        for choice in choices
    )
    wish = (
        "Here is how this user chose between two answers before. Answer the next question in the "
        f"way this user likes.\n\n{shown}"
    )
    return [{"role": "system", "content": wish}, *asked]


def prompted_scores(
    model: LanguageModel, data: PreferenceData, beta: float
) -> Callable[[Batch], Scores]:
    """What `evaluation.evaluate` calls: the scores of a batch of `tasks.collate_rows`."""
    choices = data.preferences
    plain: dict[str, float] = {}

    def score(batch: Batch) -> Scores:
        mask = batch["target_mask"].cpu()
        margins = torch.zeros(mask.shape, dtype=torch.float32)
        asked: list[Pair] = []
        unprompted: list[Pair] = []
        for user, place in mask.nonzero().tolist():
            context = batch["context_rows"][user][batch["context_mask"][user]].tolist()
            target = choices[int(batch["target_rows"][user, place])]
            prompt = prompt_with_choices([choices[row] for row in context], target.prompt)
            asked.append((prompt, target.chosen, target.rejected))
            unprompted.append((target.prompt, target.chosen, target.rejected))
        # Chat messages cannot be keys.
        new = {repr(pair): pair for pair in unprompted if repr(pair) not in plain}
        plain.update(zip(new, _margins(model, list(new.values())).tolist(), strict=True))
        reference = torch.tensor([plain[repr(pair)] for pair in unprompted])
        margins[mask] = implicit_reward(_margins(model, asked), reference, beta=beta)
        return Scores.of_margins(margins)

    return score


@torch.no_grad()
def _margins(model: LanguageModel, pairs: Sequence[Pair]) -> torch.Tensor:
    """log p of the first answer − log p of the second, given their prompt ``[m]``, nats."""
    texts = []
    for prompt, *answers in pairs:
        tokens = [model.option_tokens(prompt, answer) for answer in answers]
        texts.append((tokens[0][0], [answer for _, answer in tokens]))
    result = torch.empty(len(texts))
    lengths = [len(prompt) + sum(map(len, answers)) for prompt, answers in texts]
    for batch in batches_by_tokens(lengths, MAX_BATCH_TOKENS):
        packed = PackedOptions.pack_texts([texts[i] for i in batch], model.decoder.device)
        first, second = answer_logprobs(model.decoder, packed).view(-1, 2).unbind(1)
        result[batch] = (first - second).cpu()
    return result


def _text(content: Content) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(turn["content"] for turn in as_messages(content, ()))
