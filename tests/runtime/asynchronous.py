"""What tests of asynchronous callers share: an `LLM` that is accounted for, and serving it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import torch

from fssa_runtime import LLM, AsyncEngine, SamplingParams
from fssa_runtime.answer_stream import Part
from fssa_runtime.models.language_model import LanguageModel

from .conditioned import LATENT_DIM, random_conditioning

PROMPTS = [f"Tell me of {what}." for what in ("bread", "the sea", "cats", "dogs", "rain", "x")]
LONG = SamplingParams(max_tokens=400, ignore_eos=True)


@contextmanager
def accounted_llm(model: LanguageModel) -> Iterator[LLM]:
    made = LLM(model, random_conditioning(model, "gated"), max_batch_size=8)
    for seed, name in enumerate(("ana", "ben")):
        generator = torch.Generator().manual_seed(seed)
        made.users.set_latent(name, torch.randn(LATENT_DIM, generator=generator))
    made.engine.debug = True
    yield made
    assert len(made.engine) == 0
    made.engine.scheduler.check()
    assert made.engine.scheduler.pool.num_free == made.engine.cache.num_pages
    assert made.engine.slots is not None
    assert not made.engine.slots._references.num_referred


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test; nothing of it may hang."""

    async def bounded() -> None:
        await asyncio.wait_for(test(), 120)

    asyncio.run(bounded())


@asynccontextmanager
async def serving(llm: LLM, **limits: int) -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine(llm, **limits) as engine:
        yield engine
        for _ in range(500):  # what was aborted is gone after the step that was under way
            if not len(engine) and not len(llm.engine):
                break
            await asyncio.sleep(0.01)
        assert len(engine) == 0
        assert len(llm.engine) == 0
    assert not any(thread.name == "fssa-engine" for thread in threading.enumerate())


def joined(parts: list[Part]) -> Part:
    whole = Part(0)
    for part in parts:
        assert whole.finish_reason is None, "nothing follows the end"
        whole.text += part.text
        whole.tokens += part.tokens
        whole.logprobs += part.logprobs
        whole.top_logprobs += part.top_logprobs
        whole.prompt_logprobs = part.prompt_logprobs or whole.prompt_logprobs
        whole.finish_reason = part.finish_reason
    return whole
