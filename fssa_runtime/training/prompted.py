"""The baseline without training: a user's choices pasted into the prompt.

    r(y) = β ( log π(ỹ | choices, x) − log π(ỹ | x) )

under the base model, which is how anybody would try it first. Without choices r is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
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
# Tokens that all begin with, and how each goes on.
Text = tuple[list[int], list[list[int]]]


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
        # Who has chosen nothing has no say: r is 0.
        mask = (batch["target_mask"] & batch["context_mask"].any(1, keepdim=True)).cpu()
        margins = torch.zeros(mask.shape, dtype=torch.float32)
        asked: list[list[Pair]] = []
        unprompted: list[Pair] = []
        for user in mask.any(1).nonzero()[:, 0].tolist():
            context = batch["context_rows"][user][batch["context_mask"][user]].tolist()
            shown = [choices[row] for row in context]
            asked.append([])
            for row in batch["target_rows"].cpu()[user, mask[user]].tolist():
                target = choices[row]
                prompt = prompt_with_choices(shown, target.prompt)
                asked[-1].append((prompt, target.chosen, target.rejected))
                unprompted.append((target.prompt, target.chosen, target.rejected))
        # Chat messages cannot be keys.
        new = {repr(pair): pair for pair in unprompted if repr(pair) not in plain}
        plain.update(zip(new, _margins(model, [[p] for p in new.values()]).tolist(), strict=True))
        reference = torch.tensor([plain[repr(pair)] for pair in unprompted])
        margins[mask] = implicit_reward(_margins(model, asked), reference, beta=beta)
        return Scores.of_margins(margins)

    return score


@torch.no_grad()
def _margins(model: LanguageModel, groups: Sequence[Sequence[Pair]]) -> torch.Tensor:
    """log p of the first answer − log p of the second, given their prompt ``[m]``, nats.

    The prompts of a group begin alike, with the same choices: that is read once.
    """
    texts: list[Text] = []
    starts: list[list[int]] = []
    for group in groups:
        options = [
            model.option_tokens(prompt, answer) for prompt, *answers in group for answer in answers
        ]
        shared = _shared_start([prompt for prompt, _ in options])
        common = options[0][0][:shared]
        texts.append((common, [prompt[shared:] + answer for prompt, answer in options]))
        starts.append([len(prompt) for prompt, _ in options])
    margins = []
    lengths = [len(common) + sum(map(len, rest)) for common, rest in texts]
    for batch in batches_by_tokens(lengths, MAX_BATCH_TOKENS):
        packed = PackedOptions.pack_texts([texts[i] for i in batch], model.decoder.device)
        begin = torch.tensor([start for i in batch for start in starts[i]])
        values = answer_logprobs(model.decoder, packed, starts=begin.to(packed.positions.device))
        margins.append(values.view(-1, 2).diff(dim=1)[:, 0].neg().cpu())
    return torch.cat([torch.empty(0), *margins])


def _shared_start(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all begin with, of a template that has at least one before what is said."""
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    shared = sum(1 for _ in alike)
    assert shared, "prompts of one chat template begin alike"
    return shared


def _text(content: Content) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(turn["content"] for turn in as_messages(content, ()))
