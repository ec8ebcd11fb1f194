"""The baseline without training: a user's choices pasted into the prompt.

    r(y) = β ( log π(ỹ | choices, x) − log π(ỹ | x) )

under the base model, which is how anybody would try it first. Without choices r is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..models.language_model import LanguageModel
from ..models.packed import PackedOptions, batches_by_tokens
from .data import Content, Preference, PreferenceData, as_messages
from .evaluation import Batch, Scores, spread
from .losses import implicit_reward, luce_log_probs
from .policy_options import MAX_BATCH_TOKENS, answer_logprobs

# A prompt and answers to it, in text or chat messages.
Question = tuple[Any, tuple[Content, ...]]
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
        + "\n".join(f"Disliked answer: {_text(answer)}" for answer in choice.all_rejected)
        for choice in choices
    )
    count = "several" if any(choice.also_rejected for choice in choices) else "two"
    wish = (
        f"Here is how this user chose between {count} answers before. Answer the next question in "
        f"the way this user likes.\n\n{shown}"
    )
    return [{"role": "system", "content": wish}, *asked]


def prompted_scores(
    model: LanguageModel, data: PreferenceData, beta: float
) -> Callable[[Batch], Scores]:
    """What `evaluation.evaluate` calls: the scores of a batch of `tasks.collate_rows`."""
    choices = data.preferences
    plain: dict[str, torch.Tensor] = {}

    def reference(questions: Sequence[Question]) -> list[torch.Tensor]:
        """log p of the answers without anybody's choices; each is read once. Chat messages cannot
        be keys."""
        new = {repr(asked): asked for asked in questions if repr(asked) not in plain}
        plain.update(zip(new, _logprobs(model, [[asked] for asked in new.values()]), strict=True))
        return [plain[repr(asked)] for asked in questions]

    def score(batch: Batch) -> Scores:
        mask, context_mask = batch["target_mask"].cpu(), batch["context_mask"].cpu()
        asked: list[Question] = []
        told: list[list[Question]] = []
        is_told: list[bool] = []
        for user in range(len(mask)):
            shown = [choices[row] for row in batch["context_rows"].cpu()[user, context_mask[user]]]
            targets = [choices[row] for row in batch["target_rows"].cpu()[user, mask[user]]]
            questions = [(t.prompt, (t.chosen, *t.all_rejected)) for t in targets]
            asked += questions
            is_told += [bool(shown)] * len(questions)
            if shown and questions:
                told.append([(prompt_with_choices(shown, prompt), a) for prompt, a in questions])
        with_choices = iter(_logprobs(model, told))
        every = [
            # Who has chosen nothing is asked the same: r is 0.
            implicit_reward(next(with_choices) if tells else without, without, beta=beta)
            for tells, without in zip(is_told, reference(asked), strict=True)
        ]
        sizes = torch.tensor([len(reward) for reward in every])
        padded = pad_sequence(every, batch_first=True)
        real = torch.arange(padded.shape[1]) < sizes[:, None]
        log_probs = luce_log_probs(padded[:, 0], padded[:, 1:], real[:, 1:])
        return Scores(spread(log_probs, mask), None)

    return score


@torch.no_grad()
def _logprobs(model: LanguageModel, groups: Sequence[Sequence[Question]]) -> list[torch.Tensor]:
    """log p of the answers to each question, given their prompt, nats.

    The prompts of a group begin alike, with the same choices: that is read once.
    """
    texts: list[Text] = []
    starts: list[list[int]] = []
    for group in groups:
        options = [
            model.option_tokens(prompt, answer) for prompt, answers in group for answer in answers
        ]
        shared = _shared_start([prompt for prompt, _ in options])
        common = options[0][0][:shared]
        texts.append((common, [prompt[shared:] + answer for prompt, answer in options]))
        starts.append([len(prompt) for prompt, _ in options])
    values = []
    lengths = [len(common) + sum(map(len, rest)) for common, rest in texts]
    for batch in batches_by_tokens(lengths, MAX_BATCH_TOKENS):
        packed = PackedOptions.pack_texts([texts[i] for i in batch], model.decoder.device)
        begin = torch.tensor([start for i in batch for start in starts[i]])
        of_batch = answer_logprobs(model.decoder, packed, starts=begin.to(packed.positions.device))
        values.append(of_batch.cpu())
    sizes = [len(answers) for group in groups for _, answers in group]
    return list(torch.cat([torch.empty(0), *values]).split(sizes))


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
