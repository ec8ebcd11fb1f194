"""Asynchronous callers: the same answers, and whatever a caller does the engine lives on."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fssa_runtime import LLM, AsyncEngine, SamplingParams
from fssa_runtime.answer_stream import AnswerStream, Part
from fssa_runtime.engine.grammar import Grammar, Grammars
from fssa_runtime.errors import EngineError, InputError, OverloadedError
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.request import Request

from .asynchronous import LONG, PROMPTS, accounted_llm, joined, run, serving
from .conditioned import small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small_model(tmp_path_factory.mktemp("async") / "model")


@pytest.fixture
def llm(model: LanguageModel) -> Iterator[LLM]:
    with accounted_llm(model) as made:
        yield made


def test_the_same_answers_as_offline(llm: LLM) -> None:
    users = ["ana", None, "ben", {"ana": 0.5, "ben": 0.5}, "ana", None]
    sampling = SamplingParams(
        max_tokens=20, temperature=1.0, seed=7, top_logprobs=2, prompt_logprobs=0
    )
    expected = llm.generate(PROMPTS, users, sampling, progress=False)

    async def test() -> None:
        async with serving(llm) as engine:
            outputs = await asyncio.gather(
                *(engine.generate(p, u, sampling) for p, u in zip(PROMPTS, users, strict=True))
            )
            assert outputs == expected

            async def read(prompt: str, user: object) -> Part:
                stream = engine.stream(prompt, user, sampling)  # type: ignore[arg-type]
                return joined([part async for part in stream])

            streamed = await asyncio.gather(*map(read, PROMPTS, users))
            for part, output in zip(streamed, expected, strict=True):
                answer = output.answers[0]
                assert (part.text, part.tokens) == (answer.text, answer.tokens)
                assert part.logprobs == answer.logprobs
                assert part.top_logprobs == answer.top_logprobs
                assert part.prompt_logprobs == answer.prompt_logprobs
                assert part.finish_reason == answer.finish_reason

    run(test)


def test_what_is_asked_for_reaches_the_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict = {"n": 2, "best_of": 3, "priority": 1, "timeout": 5.0, "tenant": "key"}
    expected = llm.request("Why?", "ana", LONG, **asked)
    assert {name: getattr(expected, name) for name in asked} == asked
    heard = []
    answer = AsyncEngine.stream_request

    def listen(engine: AsyncEngine, request: Request, **named: Any) -> AnswerStream:
        heard.append(request)
        return answer(engine, request, **named)

    monkeypatch.setattr(AsyncEngine, "stream_request", listen)

    async def test() -> None:
        async with serving(llm) as engine:
            engine.stream("Why?", "ana", LONG, **asked)
            await engine.generate("Why?", "ana", LONG, **asked)
            assert heard == [expected, expected]

    run(test)


def test_several_answers_and_the_best_of_them(llm: LLM) -> None:
    sampling = SamplingParams(max_tokens=9, temperature=1.0, seed=1)
    every = llm.generate(["Why?"], "ana", sampling, n=4, progress=False)
    best = llm.generate(["Why?"], "ana", sampling, n=2, best_of=4, progress=False)

    async def test() -> None:
        async with serving(llm) as engine:
            assert [await engine.generate("Why?", "ana", sampling, n=4)] == every
            assert [await engine.generate("Why?", "ana", sampling, n=2, best_of=4)] == best
            parts: dict[int, list[Part]] = {}
            async for part in engine.stream("Why?", "ana", sampling, n=4):
                parts.setdefault(part.answer, []).append(part)
            assert [joined(parts[i]).text for i in range(4)] == [a.text for a in every[0].answers]
            whole = [p async for p in engine.stream("Why?", "ana", sampling, n=2, best_of=4)]
            assert [part.tokens for part in whole] == [a.tokens for a in best[0].answers]

    run(test)


def test_text_comes_while_it_is_written(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as engine:
            seen = 0
            async for part in engine.stream("Why?", sampling=LONG):
                seen += 1
                if part.finish_reason is None and seen == 3:
                    assert len(engine) == 1
                    break
            assert seen == 3

    run(test)


def test_who_reads_slowly_gets_longer_parts(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as engine:
            stream = engine.stream("Why?", sampling=SamplingParams(max_tokens=60, ignore_eos=True))
            await stream.start()
            while len(engine):
                await asyncio.sleep(0.01)
            parts = [part async for part in stream]
            assert [len(part.tokens) for part in parts] == [60]

    run(test)


@pytest.mark.parametrize("phase", ["waiting", "prompt", "answer"])
@pytest.mark.parametrize("how", ["cancelled", "left", "dropped", "id"])
def test_a_client_that_goes_away(llm: LLM, how: str, phase: str) -> None:
    """In each phase: what it held is free again, and the others get what they would have."""
    expected = llm.generate(["Why?"], "ben", SamplingParams(max_tokens=30), progress=False)[0]
    prompt = "x" * 90 if phase == "prompt" else "Why?"

    async def test() -> None:
        async with serving(llm) as engine:
            blockers = []
            if phase == "waiting":  # every row is taken
                blockers = [
                    asyncio.create_task(engine.generate(p, "ana", LONG)) for p in PROMPTS + PROMPTS
                ]
                await asyncio.sleep(0.05)
            stream = engine.stream(prompt, "ana", LONG, request_id="gone")
            other = asyncio.create_task(
                engine.generate("Why?", "ben", SamplingParams(max_tokens=30))
            )
            await stream.start()
            if phase == "answer":
                await stream.__anext__()
            if how == "cancelled":

                async def read() -> None:
                    async for _ in stream:
                        pass

                reader = asyncio.create_task(read())
                await asyncio.sleep(0)
                reader.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reader
            elif how == "left":
                async with stream:
                    pass
                assert [part async for part in stream if part.finish_reason] == []
            elif how == "id":
                assert engine.abort("gone")
                with pytest.raises(EngineError, match="request 'gone' was aborted"):
                    async for _ in stream:
                        pass
            else:
                del stream
                gc.collect()
            assert not engine.abort("gone")
            for blocker in blockers:
                blocker.cancel()
            assert await other == expected

    run(test)


def test_more_requests_than_may_be(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm, max_requests=2) as engine:
            streams = [engine.stream(prompt, sampling=LONG) for prompt in PROMPTS[:2]]
            for stream in streams:
                await stream.start()
            with pytest.raises(OverloadedError, match="2 requests are in flight already"):
                await engine.generate("Why?")
            streams[0].abort()
            assert (await engine.generate("Why?", sampling=SamplingParams(max_tokens=2))).text
            streams[1].abort()

    run(test)


def test_request_ids(llm: LLM) -> None:
    """Two in flight may not share one; one that is over may be used again, and is another's."""
    few = SamplingParams(max_tokens=3)

    async def test() -> None:
        async with serving(llm) as engine:
            first = engine.stream("Why?", sampling=LONG, request_id="a")
            await first.start()
            with pytest.raises(InputError, match="request id 'a' is in flight already"):
                await engine.generate("Why?", request_id="a")
            assert len(engine) == 1
            first.abort()
            second = engine.stream("Why?", sampling=few, request_id="a")
            await second.start()
            first.abort()  # once more: its successor must not hear of it
            assert len(joined([part async for part in second]).tokens) == 3
            assert not engine.abort("a")
            assert not engine.abort("unheard of")

    run(test)


def test_a_request_begins_once(llm: LLM) -> None:
    """Though two ask for it while its grammar is compiled."""
    sampling = SamplingParams(max_tokens=400, regex="(a|b){300}")

    async def test() -> None:
        async with serving(llm) as engine:
            stream = engine.stream("Why?", sampling=sampling)
            await asyncio.gather(stream.start(), stream.start())
            assert len(engine) == 1
            stream.abort()
            assert len(engine) == 0

    run(test)


def test_no_grammar_is_compiled_in_the_engine_s_thread(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few are kept of those that others asked for meanwhile."""
    monkeypatch.setattr("fssa_runtime.engine.grammar._MAX_KEPT", 0)
    compile_, threads = Grammars._compile, []

    def noted(grammars: Grammars, kind: str, text: str) -> Grammar:
        threads.append(threading.current_thread().name)
        return compile_(grammars, kind, text)

    monkeypatch.setattr(Grammars, "_compile", noted)

    async def test() -> None:
        async with serving(llm) as engine:
            output = await engine.generate("Why?", sampling=SamplingParams(regex="(a|b){9}"), n=3)
            assert [len(answer.text) for answer in output.answers] == [9] * 3
        assert len(threads) == 1
        assert threads[0] != "fssa-engine"

    run(test)


def test_a_request_that_is_dropped_before_it_begins(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as engine:
            for sampling in (LONG, SamplingParams(regex="(a|b){300}")):
                stream = engine.stream("Why?", sampling=sampling)
                stream.abort()
                assert [part async for part in stream] == []
                stream = engine.stream("Why?", sampling=sampling)
                starting = asyncio.create_task(stream.start())
                await asyncio.sleep(0)
                stream.abort()
                await starting
                assert [part async for part in stream if part.finish_reason] == []
                assert len(engine) == 0

    run(test)


def test_answers_that_have_not_ended(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as engine:
            stream = engine.stream("Why?", sampling=LONG)
            with pytest.raises(EngineError, match="goes on: its answers have not ended"):
                _ = stream.completions
            await stream.start()
            stream.abort()
            with pytest.raises(EngineError, match="the request was dropped"):
                _ = stream.completions

    run(test)


def test_bad_requests_cost_nothing(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as engine:
            running = asyncio.create_task(engine.generate("Why?", sampling=LONG))
            await asyncio.sleep(0)
            with pytest.raises(InputError, match="user 'eve' is not known"):
                await engine.generate("Why?", "eve")
            with pytest.raises(InputError, match="prompt and answer need"):
                await engine.generate("Why?", sampling=SamplingParams(max_tokens=100_000))
            with pytest.raises(InputError, match="regex: "):
                await engine.generate("Why?", sampling=SamplingParams(regex="("))
            with pytest.raises(InputError, match="n must be at least 1"):
                await engine.generate("Why?", n=0)
            assert len((await running).answers[0].tokens) == 400

    run(test)


def test_a_step_that_fails(llm: LLM) -> None:
    """Those in flight are told; the next request is served."""
    expected = llm.generate(["Why?"], "ana", SamplingParams(max_tokens=5), progress=False)[0]

    async def test() -> None:
        async with serving(llm) as engine:
            stream = engine.stream("Why?", "ana", LONG)
            await stream.__anext__()
            original = llm.engine.runner.run

            def broken(*step: Any) -> list:
                raise RuntimeError("out of luck")

            llm.engine.runner.run = broken  # type: ignore[assignment, method-assign]
            with pytest.raises(EngineError, match="a step failed: RuntimeError: out of luck"):
                async for _ in stream:
                    pass
            llm.engine.runner.run = original  # type: ignore[method-assign]
            assert await engine.generate("Why?", "ana", SamplingParams(max_tokens=5)) == expected

    run(test)


def test_closing(llm: LLM) -> None:
    async def test() -> None:
        engine = AsyncEngine(llm)
        with pytest.raises(InputError, match="an AsyncEngine runs this model's engine"):
            llm.generate(["Why?"])
        with pytest.raises(InputError, match="runs this model's engine already"):
            AsyncEngine(llm)
        stream = engine.stream("Why?", sampling=LONG)
        await stream.start()
        await engine.close(drain=True)
        assert len(joined([part async for part in stream]).tokens) == 400
        with pytest.raises(EngineError, match="the engine is closed"):
            await engine.generate("Why?")
        with pytest.raises(EngineError, match="the engine is closed"):
            await engine.call(lambda: None)
        await engine.close()

        engine = AsyncEngine(llm)
        stream = engine.stream("Why?", sampling=LONG)
        await stream.start()
        await engine.close()
        with pytest.raises(EngineError, match="the engine was closed"):
            async for _ in stream:
                pass
        assert llm.generate(["Why?"], progress=False)

    run(test)


def test_closing_at_once_cuts_a_drain_short(llm: LLM) -> None:
    async def test() -> None:
        engine = AsyncEngine(llm)
        streams = [engine.stream("Why?", sampling=LONG) for _ in range(40)]
        for stream in streams:
            await stream.start()
        await streams[0].__anext__()
        draining = asyncio.create_task(engine.close(drain=True))
        while not engine._closing:
            await asyncio.sleep(0.01)
        await engine.close()
        await draining
        assert not llm.engine.in_use.locked()
        with pytest.raises(EngineError, match="the engine was closed"):
            async for _ in streams[-1]:  # it waited for a row
                pass

    run(test)
