"""Users who are learnt, changed and deleted while requests run: nobody waits long for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch

from fssa_runtime import LLM, AsyncEngine
from fssa_runtime.errors import EngineError, InputError, OverloadedError
from fssa_runtime.models.language_model import LanguageModel

from .asynchronous import LONG, accounted_llm, joined, run, serving
from .conditioned import CHOICES, LATENT_DIM, random_conditioning, small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small_model(tmp_path_factory.mktemp("async") / "model")


@pytest.fixture
def llm(model: LanguageModel) -> Iterator[LLM]:
    with accounted_llm(model) as made:
        yield made


def test_users_change_while_requests_run(llm: LLM) -> None:
    """A request keeps the weights it came with; the next one has the new ones."""
    expected = llm.generate(["Why?"], "ana", LONG, progress=False)[0]
    other = LLM(llm.model, llm.conditioning)
    other.users.infer("ana", CHOICES)
    after = other.generate(["Why?"], "ana", LONG, progress=False)[0]

    async def test() -> None:
        async with serving(llm) as engine:
            stream = engine.stream("Why?", "ana", LONG)
            first = await stream.__anext__()
            await engine.infer("ana", CHOICES)
            fresh = asyncio.create_task(engine.generate("Why?", "ana", LONG))
            await asyncio.sleep(0.05)
            await engine.delete("ana")
            with pytest.raises(InputError, match="user 'ana' is not known"):
                await engine.generate("Why?", "ana")
            whole = joined([first] + [part async for part in stream])
            assert whole.logprobs == expected.answers[0].logprobs
            assert (await fresh).answers == after.answers
            with pytest.raises(InputError, match="choice 0: chosen and rejected are the same"):
                await engine.infer("eve", [("Why?", "a", "a")])
            assert "eve" not in llm.users

    run(test)


def test_choices_are_read_between_the_steps_of_others(model: LanguageModel) -> None:
    """A long list of choices holds nobody up for longer than a step's worth of it."""
    llm = LLM(model, random_conditioning(model, "gated"), max_batch_size=8, max_batch_tokens=64)
    choices = [("Why?", "a" * 20 + str(n), "b" * 30 + str(n)) for n in range(8)]
    expected = LLM(model, llm.conditioning).users.infer("ana", choices)

    async def test() -> None:
        async with AsyncEngine(llm) as engine:
            stream = engine.stream("Why?", sampling=LONG)
            read = len((await stream.__anext__()).tokens)
            steps = 0
            original = llm.engine.step

            def counted(most: int) -> list:
                nonlocal steps
                steps += 1
                return original(most)

            llm.engine.step = counted  # type: ignore[method-assign]
            user = await engine.infer("ana", choices)
            assert steps >= 8  # of two or fewer options each
            torch.testing.assert_close(user.latent, expected.latent)
            read += len((await stream.__anext__()).tokens)
            assert read > 8
            stream.abort()

    run(test)


def test_changes_of_a_user_come_one_after_another(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as engine:
            await engine.infer("cy", CHOICES[:1])
            await asyncio.gather(*(engine.add_choices("cy", [choice]) for choice in CHOICES[1:]))
            assert llm.users["cy"].choices == CHOICES
            first = asyncio.create_task(engine.infer("cy", CHOICES[:2]))
            await asyncio.sleep(0)
            await engine.delete("cy")
            assert (await first).choices == CHOICES[:2]
            assert "cy" not in llm.users
            gone = asyncio.create_task(engine.infer("dan", CHOICES))
            await asyncio.sleep(0)
            gone.cancel()
            await engine.set_latent("eve", torch.zeros(LATENT_DIM))
            assert "eve" in llm.users

    run(test)


def test_texts_are_tokenised_between_the_steps_of_others(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(model, random_conditioning(model, "gated"), max_batch_size=8)
    choices = [("Why?", f"a{n}", f"b{n}") for n in range(100)]
    tokenised = [0]  # since each step
    original, step = LanguageModel.option_tokens, llm.engine.step

    def counted(model: LanguageModel, *option: str) -> tuple[list[int], list[int]]:
        tokenised[-1] += 1
        return original(model, *option)

    def stepped(most: int) -> list:
        tokenised.append(0)
        return step(most)

    monkeypatch.setattr(LanguageModel, "option_tokens", counted)
    llm.engine.step = stepped  # type: ignore[method-assign]

    async def test() -> None:
        async with AsyncEngine(llm) as engine:
            stream = engine.stream("Why?", sampling=LONG)
            await stream.__anext__()
            await engine.infer("ana", choices)
            stream.abort()
        assert sum(tokenised) == 200
        assert max(tokenised) <= 16

    run(test)


def test_a_change_that_nobody_waits_for_is_dropped(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it has begun or not, and nothing more is read for it."""
    choices = [("Why?", f"a{n}", f"b{n}") for n in range(200)]
    begun, read = asyncio.Event(), []
    original = LanguageModel.option_tokens

    async def test() -> None:
        loop = asyncio.get_running_loop()

        def counted(model: LanguageModel, *option: str) -> tuple[list[int], list[int]]:
            read.append(option)
            loop.call_soon_threadsafe(begun.set)
            return original(model, *option)

        monkeypatch.setattr(LanguageModel, "option_tokens", counted)
        async with serving(llm) as engine:
            jobs = [asyncio.create_task(engine.infer(name, choices)) for name in ("cy", "dan")]
            await begun.wait()
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
            assert all(job.cancelled() for job in jobs)
            await engine.call(lambda: None)
            assert list(llm.users) == ["ana", "ben"]
            assert len(read) < 400
            assert (await engine.infer("cy", CHOICES)).choices == CHOICES

    run(test)


def test_more_changes_than_may_wait(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm, max_jobs=2) as engine:
            go_on = threading.Event()
            first = asyncio.create_task(engine.call(lambda: go_on.wait(60)))
            second = asyncio.create_task(engine.infer("cy", CHOICES))
            await asyncio.sleep(0)
            try:
                for refused in (engine.infer("dan", CHOICES), engine.delete("ana")):
                    with pytest.raises(OverloadedError, match="2 changes of users wait already"):
                        await refused
            finally:
                go_on.set()
            assert await first
            assert (await second).choices == CHOICES
            await engine.delete("ana")
            assert list(llm.users) == ["ben", "cy"]
        with pytest.raises(EngineError, match="the engine is closed"):
            await engine.infer("eve", CHOICES)
        with pytest.raises(ValueError, match="max_jobs: expected at least 1, got 0"):
            AsyncEngine(llm, max_jobs=0)

    run(test)
