"""A base model and its users: choices in, steered answers out, many users in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress

from .conditioning.checkpoint import Choice, Conditioning, load_conditioning
from .conditioning.shipped import shipped_conditioning
from .conditioning.table import ModulationTable
from .conditioning.user_weights import UserWeights
from .engine.engine import Engine
from .errors import InputError
from .models.language_model import Content, LanguageModel
from .request import GREEDY, Completion, FinishReason, Request, SamplingParams
from .users.registry import Users, WhoseWeights

# One for all prompts, or one for each.
OneOrEach = WhoseWeights | Sequence[WhoseWeights]


@dataclass(frozen=True)
class Answer:
    """One answer: its text, tokens, their log-probabilities in nats, and why it ended."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Output:
    """What was written to one prompt; ``text`` is the first answer's."""

    prompt: Content
    answers: list[Answer]

    @property
    def text(self) -> str:
        return self.answers[0].text


class LLM:
    """A language model that writes for many users, each with weights of their own.

        llm = LLM("smollm2-135m-instruct")
        llm.users.infer("ana", [Choice("What is bread?", "Baked dough.", "Bread is a staple …")])
        llm.generate(["How do magnets work?"], users="ana")[0].text

    Args:
        model: a catalogue name, a folder, a hub id, or a model that is loaded already.
        conditioning: folder of a checkpoint, or one that is loaded; None takes what ships with the
            package for this model, if anything does. Without one nobody can be steered.
        dtype, device: of the weights, if the model is not loaded yet.
        max_resident_users: rows of the modulation table, at least a batch. There may be more
            users: who has not written for longest is put in again when they do.
        max_batch_size: answers of one step at most. max_batch_tokens: tokens of one step.
        max_kv_tokens: tokens the key-value cache holds.
        prefix_cache: use keys and values again where user and tokens before are the same.

    Attributes:
        users: everybody known, by name; see `Users`.

    Raises:
        InputError: no such model or checkpoint, or one that does not fit the other.
    """

    def __init__(
        self,
        model: str | LanguageModel,
        conditioning: str | Path | Conditioning | None = None,
        *,
        dtype: str = "bfloat16",
        device: str = "cpu",
        max_resident_users: int = 64,
        max_batch_size: int = 32,
        max_batch_tokens: int = 512,
        max_kv_tokens: int = 16384,
        prefix_cache: bool = True,
    ) -> None:
        if isinstance(model, str):
            model = LanguageModel.load(model, dtype=dtype, device=device)
        if conditioning is None:
            conditioning = shipped_conditioning(model.name)
        if isinstance(conditioning, str | Path):
            conditioning = load_conditioning(Path(conditioning), model.decoder, model.fingerprint)
        self.model = model
        self.conditioning = conditioning
        self.users = Users(model, conditioning)
        decoder = model.decoder
        modulation = table = None
        if conditioning is not None:
            modulator = conditioning.modulator
            slots = max(max_resident_users, max_batch_size)
            table = ModulationTable(modulator.layout, slots, device=decoder.device)
            nobody = torch.zeros(0, dtype=torch.int32, device=decoder.device)
            modulation = modulator.bind(table.rows, nobody, dtype=decoder.dtype)
        self.engine = Engine(
            decoder,
            model.stop_tokens,
            modulation,
            table,
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            max_kv_tokens=max_kv_tokens,
            prefix_cache=prefix_cache,
        )

    def generate(
        self,
        prompts: Sequence[Content],
        users: OneOrEach = None,
        sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
        *,
        n: int = 1,
        progress: bool = True,
    ) -> list[Output]:
        """Answer prompts (text, or chat messages), all in one stream of batches.

        Args:
            users: whose weights write: a name, a mixture ``{"ana": 0.7, "ben": 0.3}``, weights, or
                None for the base model's; one for all prompts or a list with one for each.
            sampling: one for all prompts or one for each.
            n: answers to each prompt.
            progress: show a bar, if standard error is a terminal.

        Raises:
            InputError: an unknown user, lists of another length than the prompts, or a prompt that
                can never be answered; nothing has been written then.
        """
        whose = _for_each("users", users, len(prompts), str | Mapping | UserWeights)
        how = _for_each("sampling", sampling, len(prompts), SamplingParams)
        requests = [
            Request(self.model.chat_tokens(prompt), self.users.weights(user), params, n=n)
            for prompt, user, params in zip(prompts, whose, how, strict=True)
        ]
        total = sum(params.max_tokens for params in how) * n
        with Progress(transient=True, disable=not progress) as bar:
            task = bar.add_task(f"{len(prompts)} prompts", total=total)
            completions = self.engine.generate_all(
                requests, on_token=lambda _request, _token: bar.advance(task)
            )
        return [
            Output(
                prompt,
                [
                    Answer(self.model.decode(c.tokens), c.tokens, c.logprobs, c.finish_reason)
                    for c in answers
                ],
            )
            for prompt, answers in zip(prompts, completions, strict=True)
        ]

    def run(
        self,
        requests: Sequence[Request],
        *,
        on_token: Callable[[int, int], None] | None = None,
        on_finish: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Answer requests in tokens; see `Engine.generate`."""
        return self.engine.generate(requests, on_token=on_token, on_finish=on_finish)

    def request(
        self,
        prompt: Content,
        user: WhoseWeights = None,
        sampling: SamplingParams = GREEDY,
        forced_tokens: Sequence[int] | None = None,
    ) -> Request:
        """A prompt as a request in tokens; ``forced_tokens`` as in `Request`."""
        tokens = self.model.chat_tokens(prompt)
        return Request(tokens, self.users.weights(user), sampling, forced_tokens)


def _for_each(name: str, given: object, count: int, single: object) -> list:
    """``given`` for each of ``count`` prompts."""
    if given is None or isinstance(given, single):  # type: ignore[arg-type]
        return [given] * count
    if not isinstance(given, Sequence) or len(given) != count:
        raise InputError(f"{name}: expected one for all or {count}, one for each prompt")
    return list(given)


__all__ = ["LLM", "Answer", "Choice", "Output", "SamplingParams"]
