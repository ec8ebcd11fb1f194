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
    plain: dict[tuple[Content, Content], float] = {}

    def score(batch: Batch) -> Scores:
        mask = batch["target_mask"].cpu()
        margins = torch.zeros(mask.shape, dtype=torch.float32)
        asked: list[tuple[list[dict[str, str]], Content]] = []
        unprompted: list[tuple[Content, Content]] = []
        places: list[tuple[int, int]] = mask.nonzero().tolist()
        for user, place in places:
            context = batch["context_rows"][user][batch["context_mask"][user]].tolist()
            target = choices[int(batch["target_rows"][user, place])]
            prompt = prompt_with_choices([choices[row] for row in context], target.prompt)
            asked += [(prompt, target.chosen), (prompt, target.rejected)]
            unprompted += [(target.prompt, target.chosen), (target.prompt, target.rejected)]
        new = [option for option in dict.fromkeys(unprompted) if option not in plain]
        plain.update(zip(new, _logprobs(model, new).tolist(), strict=True))
        reference = torch.tensor([plain[option] for option in unprompted])
        rewards = implicit_reward(_logprobs(model, asked), reference, beta=beta).view(-1, 2)
        for (user, place), (chosen, rejected) in zip(places, rewards.tolist(), strict=True):
            margins[user, place] = chosen - rejected
        return Scores.of_margins(margins)

    return score


@torch.no_grad()
def _logprobs(model: LanguageModel, options: Sequence[tuple[Any, Content]]) -> torch.Tensor:
    """log p of every answer given its prompt ``[m]``, nats."""
    tokens = [model.option_tokens(prompt, answer) for prompt, answer in options]
    result = torch.empty(len(tokens))
    lengths = [len(prompt) + len(answer) for prompt, answer in tokens]
    for batch in batches_by_tokens(lengths, MAX_BATCH_TOKENS):
        packed = PackedOptions.pack([tokens[i] for i in batch], model.decoder.device)
        result[batch] = answer_logprobs(model.decoder, packed).cpu()
    return result


def _text(content: Content) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(turn["content"] for turn in as_messages(content, ()))
