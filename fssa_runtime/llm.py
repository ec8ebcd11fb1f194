"""A base model and its users: choices in, steered answers out, many users in one batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from .checks import require_int
from .conditioning.checkpoint import Conditioning, load_conditioning
from .conditioning.choices import Choice
from .conditioning.shipped import shipped_conditioning
from .conditioning.table import ModulationTable
from .conditioning.user_weights import UserWeights
from .engine.engine import Engine
from .errors import InputError
from .models.language_model import LanguageModel
from .models.messages import Content
from .request import Completion, Request
from .sampling import SamplingParams
from .threads import set_or_limit_threads
from .users.registry import AnyReward, Users, WhoseWeights

# Within a conditioning's folder: the reward that says what to ask its users.
REWARD_DIR = "reward"

# One for all prompts, or one for each.
OneOrEach = WhoseWeights | Sequence[WhoseWeights]


@dataclass(frozen=True)
class Output:
    """What was written to one prompt; ``text`` is the first answer's."""

    prompt: Content
    answers: list[Completion]

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
        reward: says what to ask somebody next (`Users.suggest_next_pair`); None takes what lies in
            the folder ``reward`` of the conditioning's, if there is one.
        dtype, device: of the weights, if the model is not loaded yet.
        max_resident_users: rows of the modulation table, at least a batch. There may be more
            users: who has not written for longest is put in again when they do.
        max_batch_size: answers of one step at most. max_batch_tokens: tokens of one step.
        max_kv_tokens: tokens the key-value cache holds.
        prefix_cache: use keys and values again where user and tokens before are the same.
        threads: that compute on a CPU, torch's included. None leaves torch's number as it is, but
            where `set_threads` has not chosen it no more than ``OMP_NUM_THREADS`` or, if that is
            not set, the physical cores this process may use, a container's quota included. A
            smaller number set in torch later is obeyed, a larger one is not.

    Attributes:
        users: everybody known, by name; see `Users`.
        served_by: the `AsyncEngine` whose thread runs the engine, if one does; then only it may.

    Raises:
        InputError: no such model or checkpoint, or one that does not fit the other; a number that
            is no integer or below 1.
    """

    def __init__(
        self,
        model: str | Path | LanguageModel,
        conditioning: str | Path | Conditioning | None = None,
        *,
        reward: AnyReward | None = None,
        dtype: str = "bfloat16",
        device: str = "cpu",
        max_resident_users: int = 64,
        max_batch_size: int = 32,
        max_batch_tokens: int = 512,
        max_kv_tokens: int = 16384,
        prefix_cache: bool = True,
        threads: int | None = None,
    ) -> None:
        for name, most in (
            ("max_resident_users", max_resident_users),
            ("max_batch_size", max_batch_size),
            ("max_batch_tokens", max_batch_tokens),
            ("max_kv_tokens", max_kv_tokens),
        ):
            require_int(name, most)
            if most < 1:
                raise InputError(f"{name}: expected at least 1, got {most}")
        if not isinstance(model, str | Path | LanguageModel):
            raise InputError(
                f"model: expected a name, a folder or a LanguageModel, got {type(model).__name__}"
            )
        set_or_limit_threads(threads)
        if not isinstance(model, LanguageModel):
            model = LanguageModel.load(str(model), dtype=dtype, device=device)
        if conditioning is None:
            conditioning = shipped_conditioning(model.name)
        if isinstance(conditioning, str | Path):
            beside = Path(conditioning) / REWARD_DIR
            if reward is None and beside.is_dir():
                reward = beside
            conditioning = load_conditioning(Path(conditioning), model.decoder, model.fingerprint)
        self.model = model
        self.conditioning = conditioning
        self.users = Users(
            model, conditioning, reward=reward, forget=lambda gone: self.engine.forget(gone)
        )
        self.served_by: object = None
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
            tokenizer=model.copy_tokenizer(),
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            max_kv_tokens=max_kv_tokens,
            prefix_cache=prefix_cache,
        )

    @property
    def default_sampling(self) -> SamplingParams:
        """What the model's ``generation_config.json`` recommends; greedy if it says nothing.

        ``dataclasses.replace(llm.default_sampling, max_tokens=500)`` changes a part of it.
        """
        return self.model.default_sampling

    def generate(
        self,
        prompts: str | Sequence[Content],
        users: OneOrEach = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        best_of: int | None = None,
        progress: bool = True,
    ) -> list[Output]:
        """Answer prompts (text, or chat messages), all in one stream of batches.

        Args:
            prompts: a list of them; text alone is a list of one.
            users: whose weights write: a name, a mixture ``{"ana": 0.7, "ben": 0.3}``, weights, or
                None for the base model's; one for all prompts or a list with one for each.
            sampling: one for all prompts or one for each; None is `default_sampling`, shortened
                where there is less room for an answer.
            n: answers to each prompt.
            best_of: answers that are written to each, of which the n likeliest are returned.
            progress: show a bar, if standard error is a terminal.

        Raises:
            InputError: an unknown user, lists of another length than the prompts, or a prompt that
                can never be answered; nothing has been written then. Or another thread is inside
                `generate` or `run`: an `AsyncEngine` serves many.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        if not isinstance(prompts, Sequence):
            raise InputError(f"prompts: expected a list, got {type(prompts).__name__}")
        whose = _for_each("users", users, len(prompts), str | Mapping | UserWeights)
        how = _for_each("sampling", sampling, len(prompts), SamplingParams)
        requests = [
            self.request(prompt, user, params, n=n, best_of=best_of)
            for prompt, user, params in zip(prompts, whose, how, strict=True)
        ]
        num_answers = sum(request.num_answers for request in requests)
        shown = progress and sys.stderr.isatty()
        with Progress(console=Console(stderr=True), transient=True, disable=not shown) as bar:
            task = bar.add_task(f"{len(prompts)} prompts", total=num_answers)
            completions = self._engine().generate_all(
                requests, on_finish=lambda _request, _answer, _completion: bar.advance(task)
            )
        return [Output(*pair) for pair in zip(prompts, completions, strict=True)]

    def run(
        self,
        requests: Sequence[Request],
        *,
        on_token: Callable[[int, int], None] | None = None,
        on_finish: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Answer requests in tokens; see `Engine.generate`."""
        return self._engine().generate(requests, on_token=on_token, on_finish=on_finish)

    def _engine(self) -> Engine:
        if self.served_by is not None:
            raise InputError("an AsyncEngine runs this model's engine: ask it, or close it first")
        return self.engine

    def request(
        self,
        prompt: Content,
        user: WhoseWeights = None,
        sampling: SamplingParams | None = None,
        forced_tokens: Sequence[int] | None = None,
        *,
        n: int = 1,
        best_of: int | None = None,
        priority: int = 0,
        timeout: float | None = None,
        tenant: Hashable = None,
    ) -> Request:
        """A prompt as a request in tokens; what the rest means stands in `Request`.

        Without ``sampling`` it is `default_sampling`, and as many tokens of that as there is room
        for: nobody asked for more.

        Raises:
            InputError: an unknown user, a prompt that is neither text nor chat messages, or numbers
                out of range.
        """
        if not isinstance(sampling, SamplingParams | None):
            raise InputError(
                f"sampling: expected SamplingParams or None, got {type(sampling).__name__}"
            )
        tokens = self.model.chat_tokens(prompt)
        if sampling is None:
            sampling = self.default_sampling
            room = max(1, self.engine.room_after(len(tokens)))
            if sampling.max_tokens is not None and sampling.max_tokens > room:
                sampling = replace(sampling, max_tokens=room)
        return Request(
            tokens,
            self.users.weights(user),
            sampling,
            forced_tokens,
            n=n,
            best_of=best_of,
            priority=priority,
            timeout=timeout,
            tenant=tenant,
        )


def _for_each(name: str, given: object, count: int, single: object) -> list:
    """``given`` for each of ``count`` prompts."""
    if given is None or isinstance(given, single):  # type: ignore[arg-type]
        return [given] * count
    if not isinstance(given, Sequence) or len(given) != count:
        raise InputError(f"{name}: expected one for all or {count}, one for each prompt")
    return list(given)


__all__ = ["LLM", "Choice", "Output", "SamplingParams"]
