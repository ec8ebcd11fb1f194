"""Continuous batching on a small random model: results do not depend on company."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fssa_kernels.gpu.graph import CudaStepGraph
from fssa_kernels.native import RecordingError
from fssa_runtime.conditioning.user_weights import UserWeights
from fssa_runtime.engine.engine import Engine
from fssa_runtime.engine.runner import Chosen
from fssa_runtime.engine.step_inputs import Row, StepInputs
from fssa_runtime.errors import InputError
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.request import Completion, Request, SamplingParams

from .conditioned import small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small_model(tmp_path_factory.mktemp("engine") / "model")


def engine(model: LanguageModel, **changes: int) -> Engine:
    settings = {
        "max_batch_size": 4,
        "max_kv_tokens": 256,
        "page_size": 4,
        "debug": True,
        **changes,
    }
    return Engine(model.decoder, frozenset({257}), **settings)


def mixed_requests() -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    requests = []
    for index in range(11):
        length = int(torch.randint(1, 40, (), generator=generator))
        prompt = torch.randint(0, 256, (length,), generator=generator).tolist()
        temperature = 0.0 if index % 2 else 1.0
        sampling = SamplingParams(max_tokens=1 + index, temperature=temperature, seed=index)
        requests.append(Request(prompt, sampling=sampling))
    return requests


def same(ours: Completion, theirs: Completion) -> bool:
    close = torch.allclose(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=1e-5)
    return ours.tokens == theirs.tokens and close


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_batch_size": 1},
        {"max_batch_tokens": 5},
        {"max_kv_tokens": 64},
        {"page_size": 1},
        {"page_size": 64},
    ],
)
def test_answers_do_not_depend_on_the_batch(model: LanguageModel, limits: dict) -> None:
    requests = mixed_requests()
    alone = [engine(model).generate([request])[0] for request in requests]
    shared = engine(model, **limits)
    together = shared.generate(requests)
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))
    assert shared.scheduler.pool.num_free == shared.cache.num_pages


def test_pages_of_earlier_requests_do_not_leak_into_later_ones(model: LanguageModel) -> None:
    requests = mixed_requests()
    first = engine(model, prefix_cache=False)
    expected = first.generate(requests)
    first.cache.k.fill_(float("nan"))
    first.cache.v.fill_(float("nan"))
    assert all(same(a, b) for a, b in zip(first.generate(requests), expected, strict=True))


def test_keys_and_values_begin_on_huge_pages(model: LanguageModel) -> None:
    cache = engine(model).cache
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert cache.k.data_ptr() % 2**21 == cache.v.data_ptr() % 2**21 == 0
    assert cache.k.dtype == cache.v.dtype == model.decoder.dtype


def test_the_end_of_an_answer(model: LanguageModel) -> None:
    prompt = list(b"hello")
    free = engine(model).generate([Request(prompt, sampling=SamplingParams(max_tokens=8))])[0]
    assert free.finish_reason == "length"
    assert len(free.tokens) == len(free.logprobs) == 8
    stop = free.tokens[3]
    stopping = Engine(model.decoder, frozenset({stop}))
    stopped = stopping.generate([Request(prompt, sampling=SamplingParams(max_tokens=8))])[0]
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]


def test_an_answer_never_grows_past_its_length(model: LanguageModel) -> None:
    """Though the count of what is written were to step over it."""
    asked = engine(model)
    asked.add(Request(list(b"hello"), sampling=SamplingParams(max_tokens=3)))
    (answer,) = asked._answers.values()
    answer.stream.max_tokens = 2.5  # type: ignore[assignment]
    tokens = [token for _ in range(3) for token in asked.step()]
    assert tokens[-1].finish_reason == "length"
    assert len(asked) == 0


def test_forced_tokens_are_scored_not_chosen(model: LanguageModel) -> None:
    prompt, forced = list(b"abc"), list(b"xyzzy")
    scored = engine(model).generate([Request(prompt, forced_tokens=forced)])[0]
    assert scored.tokens == forced
    longer = engine(model).generate([Request(prompt + forced[:2], forced_tokens=forced[2:])])[0]
    assert torch.allclose(
        torch.tensor(scored.logprobs[2:]), torch.tensor(longer.logprobs), atol=1e-5
    )


def test_settings_are_never_those_of_an_earlier_request(model: LanguageModel) -> None:
    """Settings that nobody holds any more are freed, and the next may lie where they lay."""
    asked = engine(model)
    prompt, draws = list(b"hello"), asked.runner._inputs.per_sequence
    (greedy,) = asked.generate([Request(prompt, sampling=SamplingParams(max_tokens=3))])
    for _ in range(20):
        asked.generate(
            [Request(prompt, sampling=SamplingParams(max_tokens=3, temperature=5.0, top_k=7))]
        )
        assert (draws["temperature"][0], draws["top_k"][0]) == (5, 7)
        (again,) = asked.generate([Request(prompt, sampling=SamplingParams(max_tokens=3))])
        assert (draws["temperature"][0], draws["top_k"][0]) == (0, 0)
        assert again.tokens == greedy.tokens


def test_a_step_that_could_not_be_written_counts_for_nothing() -> None:
    inputs = StepInputs(4, 2, max_pages=3, page_size=4, device=torch.device("cpu"))
    cold, hot = SamplingParams(), SamplingParams(temperature=2.0)
    inputs.fill([Row([1], 0, [0], 0, cold)])
    with pytest.raises(ValueError, match="broadcast"):
        inputs.fill([Row([1], 0, [0], 0, hot), Row([1], 0, [0, 1, 2, 3], 0, hot)])
    inputs.fill([Row([1], 0, [0], 0, cold)])
    assert inputs.per_sequence["temperature"][0] == 0
    # What it had written past the row that is filled now must be harmless again.
    assert inputs.per_token["kv_slots"].tolist() == [0, -1, -1, -1]
    assert inputs.per_sequence["kv_lens"].tolist() == [1, 0]
    assert inputs.q_indptr.tolist() == [0, 1, 1]


def test_callbacks_report_every_token_and_every_end(model: LanguageModel) -> None:
    requests = mixed_requests()
    seen: dict[int, list[int]] = {}
    ended: list[int] = []
    completions = engine(model).generate(
        requests,
        on_token=lambda index, token: seen.setdefault(index, []).append(token),
        on_finish=lambda index, _completion: ended.append(index),
    )
    assert sorted(ended) == list(range(len(requests)))
    assert [seen[i] for i in range(len(requests))] == [c.tokens for c in completions]


def test_an_interrupted_call_frees_its_pages(model: LanguageModel) -> None:
    interrupted = engine(model)

    def stop(_index: int, _token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted.generate(mixed_requests(), on_token=stop)
    assert interrupted.scheduler.pool.num_free == interrupted.cache.num_pages


def test_an_interrupted_step_leaves_nothing_to_be_found(model: LanguageModel) -> None:
    request = Request(list(range(60)), sampling=SamplingParams(max_tokens=8))
    limits = {"max_batch_tokens": 16}
    expected = engine(model, **limits).generate([request])[0]
    interrupted = engine(model, **limits)
    original, num_steps = interrupted.runner.run, 0

    def run(rows: list[Row], *steps: Any) -> list[list[Chosen]]:
        nonlocal num_steps
        num_steps += 1
        if num_steps < 3:
            return original(rows, *steps)
        (row,) = rows
        for position in range(row.position, row.position + len(row.tokens)):
            page, offset = row.pages[position // 4], position % 4
            interrupted.cache.k[:, page, offset] = float("nan")
            interrupted.cache.v[:, page, offset] = float("nan")
        raise KeyboardInterrupt

    interrupted.runner.run = run  # type: ignore[assignment, method-assign]
    with pytest.raises(KeyboardInterrupt):
        interrupted.generate([request])
    interrupted.runner.run = original  # type: ignore[method-assign]
    interrupted.scheduler.check()
    assert interrupted.scheduler.pool.num_free == interrupted.cache.num_pages
    assert same(interrupted.generate([request])[0], expected)
    assert interrupted.scheduler.pool.stats.found == 32  # what two steps computed


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "empty"),
        (Request([10**6]), "prompt tokens"),
        (Request([-1]), "prompt tokens"),
        (Request([1.5]), "prompt tokens must be integers, got float"),  # type: ignore[list-item]
        (Request([1] * 500, sampling=SamplingParams(max_tokens=20)), "positions"),
        (Request([1] * 250, sampling=SamplingParams(max_tokens=20)), "cache"),
        (Request([1], UserWeights.of_row(torch.zeros(3))), "no modulation"),
        (Request([1], forced_tokens=[]), "forced_tokens"),
        (Request([1], forced_tokens=[10**6]), "forced tokens"),
    ],
)
def test_requests_that_can_never_run(model: LanguageModel, request_: Request, message: str) -> None:
    refusing = engine(model)
    with pytest.raises(InputError, match=message):
        refusing.generate([Request([1]), request_])
    assert len(refusing) == 0
    assert refusing.scheduler.pool.num_free == refusing.cache.num_pages


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": 1.1},
    ],
)
def test_bad_sampling_parameters(bad: dict) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_a_step_is_replayed_from_a_recording(model: LanguageModel) -> None:
    recorded = engine(model)
    assert recorded.runner.eager_reason is None
    expected = recorded.generate(mixed_requests())
    eager = engine(model)
    eager.runner._graph = None
    assert all(same(a, b) for a, b in zip(eager.generate(mixed_requests()), expected, strict=True))


class _Recomputed:
    """Stands for a captured graph: computes anew what was captured, idle rows and all."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.outputs = call, call()

    @torch.inference_mode()
    def replay(self) -> None:
        for output, value in zip(self.outputs, self.call(), strict=True):
            output.copy_(value)


def bucketed(engine: Engine, capture: Callable[..., Any]) -> CudaStepGraph:
    runner = engine.runner
    inputs = {"tokens": runner._inputs.per_token, "sequences": runner._inputs.per_sequence}
    scheduler = engine.scheduler
    capacity = {"tokens": scheduler.max_tokens, "sequences": scheduler.max_streams}
    return CudaStepGraph(
        lambda rows: runner._step(rows["tokens"], rows["sequences"]), inputs, capacity, capture
    )


def test_rows_past_the_batch_are_harmless(model: LanguageModel) -> None:
    """As CUDA graphs do, steps compute the whole of a bucket: what is idle must change nothing."""

    def capture(call: Callable[[], Any]) -> tuple[_Recomputed, Any]:
        graph = _Recomputed(call)
        return graph, graph.outputs

    expected = engine(model).generate(mixed_requests())
    other = engine(model)
    other.runner._graph = graph = bucketed(other, capture)
    got = other.generate(mixed_requests())
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))
    assert any(tokens > 4 for tokens, _ in graph.buckets)
    assert len(graph.buckets) < 30


def test_a_step_that_cannot_be_captured_runs_eagerly(model: LanguageModel) -> None:
    def capture(call: Callable[[], Any]) -> Any:
        raise RecordingError("the GPU says no")

    expected = engine(model).generate(mixed_requests())
    other = engine(model)
    other.runner._graph = bucketed(other, capture)
    assert all(same(a, b) for a, b in zip(other.generate(mixed_requests()), expected, strict=True))
    assert other.runner.eager_reason == "the GPU says no"
