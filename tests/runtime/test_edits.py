"""Penalties, biases, stops and scores: against the plain formula, in nobody else's way."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fssa_runtime.engine.edits import Edits
from fssa_runtime.engine.engine import Engine
from fssa_runtime.errors import InputError
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.request import Completion, Request
from fssa_runtime.sampling import SamplingParams

from .conditioned import small_model
from .models import reference_model

VOCAB = 11
STOPS = frozenset({3, 4})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small_model(tmp_path_factory.mktemp("edits") / "model")


def engine(model: LanguageModel, **changes: int) -> Engine:
    limits: dict = {"max_batch_size": 4, "max_kv_tokens": 512, "page_size": 4, **changes}
    tokenizer = model.copy_tokenizer()
    return Engine(model.decoder, frozenset({257}), tokenizer=tokenizer, debug=True, **limits)


def edited_ref(
    logits: list[float], sampling: SamplingParams, prompt: list[int], written: list[int]
) -> list[float]:
    """The formula of `SamplingParams`, token by token, in float64."""
    counts, seen = Counter(written), {*prompt, *written}
    result = []
    for token, value in enumerate(logits):
        if token in seen:
            factor = sampling.repetition_penalty
            value = value / factor if value > 0 else value * factor
        value -= sampling.frequency_penalty * counts[token]
        value -= sampling.presence_penalty * (counts[token] > 0)
        value += sampling.logit_bias.get(token, 0.0)
        if token in STOPS and len(written) < sampling.min_tokens:
            value = -math.inf
        result.append(value)
    return result


@settings(deadline=None)
@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=VOCAB, max_size=VOCAB),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
    written=st.lists(st.integers(0, VOCAB - 1), max_size=150),
    repetition=st.sampled_from([1.0, 1.3, 0.5]),
    frequency=st.sampled_from([0.0, 0.7, -0.2]),
    presence=st.sampled_from([0.0, 1.1, -0.4]),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-math.inf, -3.0, 8.5])),
    min_tokens=st.integers(0, 10),
)
def test_the_formula(
    logits: list[float],
    prompt: list[int],
    written: list[int],
    repetition: float,
    frequency: float,
    presence: float,
    bias: dict[int, float],
    min_tokens: int,
) -> None:
    sampling = SamplingParams(
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logit_bias=bias,
        min_tokens=min_tokens,
    )
    edits = Edits(sampling, prompt, STOPS, None)
    for token in written:
        edits.accept(token)
    row = torch.tensor(logits)
    edits.apply(row)
    expected = edited_ref(logits, sampling, prompt, written)
    torch.testing.assert_close(row.double(), torch.tensor(expected).double(), atol=1e-4, rtol=1e-6)


def next_logits(model: LanguageModel, tokens: list[int]) -> torch.Tensor:
    """Through transformers: nothing of ours but the weights."""
    with torch.no_grad():
        return reference_model(model.folder)(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize(
    "changes",
    [
        dict(repetition_penalty=1.8),
        dict(presence_penalty=4.0, frequency_penalty=2.0),
        dict(logit_bias={65: 30.0, 66: 29.0}, frequency_penalty=5.0),
    ],
)
def test_greedy_answers_follow_the_formula(model: LanguageModel, changes: dict) -> None:
    sampling = SamplingParams(max_tokens=12, **changes)
    prompt = list(b"aab aab")
    (made,) = engine(model).generate([Request(prompt, sampling=sampling)])
    plain = engine(model).generate([Request(prompt, sampling=SamplingParams(max_tokens=12))])[0]
    assert made.tokens != plain.tokens
    logits = next_logits(model, prompt + made.tokens)
    for step, token in enumerate(made.tokens):
        row = logits[len(prompt) + step - 1]
        edited = torch.tensor(edited_ref(row.tolist(), sampling, prompt, made.tokens[:step]))
        assert edited[token] >= edited.max() - 1e-4
        assert made.logprobs[step] == pytest.approx(float(row.log_softmax(-1)[token]), abs=1e-4)


def test_ends(model: LanguageModel) -> None:
    prompt = list(b"hello")

    def ask(**changes: object) -> Completion:
        sampling = SamplingParams(max_tokens=10, **changes)  # type: ignore[arg-type]
        return engine(model).generate([Request(prompt, sampling=sampling)])[0]

    free = ask()
    token = free.tokens[3]
    first = free.tokens.index(token)
    stopped = ask(stop_token_ids=[token])
    assert (stopped.tokens, stopped.finish_reason) == (free.tokens[: first + 1], "stop")
    # The stop token is no text.
    assert stopped.text == model.decode(free.tokens[:first])
    # It cannot be chosen before there are enough, and is not left out by luck.
    later = ask(stop_token_ids=[token], min_tokens=first + 2)
    assert len(later.tokens) >= first + 2
    assert token not in later.tokens[: first + 2]
    text = model.decode(free.tokens[4:6])
    cut = ask(stop=[text])
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(text)]
    assert cut.tokens == free.tokens[: len(cut.tokens)]
    never = ask(stop=["a string that never comes"])
    assert (never.text, never.finish_reason) == (free.text, "length")
    model_stop = Engine(model.decoder, frozenset({token}), tokenizer=model.copy_tokenizer())
    on = model_stop.generate(
        [Request(prompt, sampling=SamplingParams(max_tokens=10, ignore_eos=True))]
    )
    assert on[0].tokens == free.tokens


def test_as_many_tokens_as_fit(model: LanguageModel) -> None:
    request = Request([1, 2, 3], sampling=SamplingParams(max_tokens=None, ignore_eos=True))
    (made,) = engine(model, max_kv_tokens=20).generate([request])
    assert len(made.tokens) == 18  # the last one needs no room
    (made,) = engine(model, max_kv_tokens=4096).generate([request])
    assert len(made.tokens) == model.decoder.config.max_positions - 3


def test_scores_of_prompt_and_answer(model: LanguageModel) -> None:
    """Beside transformers, in pieces, and whatever is cached."""
    prompt = list(b"the quick brown fox jumps over it all")
    sampling = SamplingParams(max_tokens=4, top_logprobs=3, prompt_logprobs=2)
    shared = engine(model, max_batch_tokens=8)
    for _ in range(2):  # the second time its pages are cached
        (made,) = shared.generate([Request(prompt, sampling=sampling)])
        expected = next_logits(model, prompt + made.tokens).log_softmax(-1)
        assert made.prompt_logprobs is not None
        assert [scored.token for scored in made.prompt_logprobs] == prompt
        assert made.prompt_logprobs[0].logprob is None
        for index, scored in enumerate(made.prompt_logprobs[1:]):
            assert scored.logprob == pytest.approx(float(expected[index, scored.token]), abs=1e-4)
            top = expected[index].topk(2)
            assert list(scored.top) == top.indices.tolist()
            assert list(scored.top.values()) == pytest.approx(top.values.tolist(), abs=1e-4)
            assert scored.top.get(scored.token, scored.logprob) == scored.logprob
        assert made.top_logprobs is not None
        assert [len(top) for top in made.top_logprobs] == [3] * 4
        for token, logprob, top_logprobs in zip(
            made.tokens, made.logprobs, made.top_logprobs, strict=True
        ):
            assert next(iter(top_logprobs)) == token
            assert top_logprobs[token] == logprob
    assert shared.scheduler.pool.stats.found == 0
    (plain,) = shared.generate([Request(prompt, sampling=SamplingParams(max_tokens=4))])
    assert shared.scheduler.pool.stats.found > 0
    assert (plain.tokens, plain.logprobs) == (made.tokens, made.logprobs)
    assert plain.top_logprobs is plain.prompt_logprobs is None


def test_prompt_scores_survive_preemption(model: LanguageModel) -> None:
    """Two long prompts that do not fit together: one is computed again from its beginning."""
    sampling = SamplingParams(max_tokens=12, prompt_logprobs=0)
    requests = [Request([index, *range(20)], sampling=sampling) for index in (7, 9, 8)]
    alone = [engine(model).generate([request])[0] for request in requests]
    crowded = engine(model, max_kv_tokens=64, max_batch_tokens=6)
    numbers = [crowded.add(request) for request in requests]
    preempted = 0
    scores: dict[int, list] = {}
    while len(crowded):
        for event in crowded.step():
            if event.prompt is not None:
                assert event.request not in scores
                scores[event.request] = event.prompt
        preempted = max([preempted, *(s.num_preempted for s in crowded.scheduler.streams())])
    assert preempted
    assert [scores[number] for number in numbers] == [each.prompt_logprobs for each in alone]


def test_best_of(model: LanguageModel) -> None:
    sampling = SamplingParams(max_tokens=8, temperature=1.5, seed=4)
    prompt = list(b"once")
    every = engine(model).generate_all([Request(prompt, sampling=sampling, n=6)])[0]
    assert len({answer.mean_logprob for answer in every}) == 6
    best = engine(model).generate_all([Request(prompt, sampling=sampling, n=2, best_of=6)])[0]
    assert best == sorted(every, key=lambda answer: -answer.mean_logprob)[:2]


def test_weights_that_give_no_numbers_end_their_own_answers(model: LanguageModel) -> None:
    """Whoever shares the batch with them gets what they get alone."""
    good = Request(list(b"hello"), sampling=SamplingParams(max_tokens=5))
    expected = engine(model).generate([good])
    shared = engine(model)
    original = shared.runner.run

    def broken(rows: list, *steps: Any) -> list:
        first, *others = original(rows, *steps)
        broken = [
            result._replace(logprob=math.nan) if len(row.scored) else result
            for row, result in zip(rows, first, strict=True)
        ]
        return [broken, *others]

    shared.runner.run = broken  # type: ignore[assignment, method-assign]
    bad = Request(list(b"hullo"), sampling=replace(good.sampling, prompt_logprobs=0), n=2)
    answers = shared.generate_all([bad, good])
    assert answers[1] == expected
    assert answers[0][0].finish_reason == "error"
    assert answers[0][0].error == "the model's log-probabilities are not numbers"
    assert answers[0][1].finish_reason == "length"
    assert len(shared) == 0


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (SamplingParams(logit_bias={999: 1.0}), "tokens of logit_bias must be in 0..383"),
        (SamplingParams(stop_token_ids=[-1]), "stop_token_ids must be in 0..383"),
    ],
)
def test_tokens_that_the_model_has_not(
    model: LanguageModel, sampling: SamplingParams, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        engine(model).generate([Request([1], sampling=sampling)])
