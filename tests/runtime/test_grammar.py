"""Answers that have to obey: what is written does, from any model, and bad grammars are refused."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fssa_runtime.completions import Gathering
from fssa_runtime.engine.engine import Engine
from fssa_runtime.engine.grammar import Grammar, Grammars
from fssa_runtime.errors import InputError
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.request import Completion, Request
from fssa_runtime.sampling import SamplingParams

from .conditioned import small_model

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "maximum": 8}},
    "required": ["kind", "legs"],
    "additionalProperties": False,
}
LARK = 'start: "<" WORD ("," WORD)* ">"\nWORD: /[a-z]{1,3}/\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small_model(tmp_path_factory.mktemp("grammar") / "model")


@pytest.fixture(scope="module")
def engine(model: LanguageModel) -> Engine:
    return Engine(
        model.decoder, model.stop_tokens, tokenizer=model.copy_tokenizer(), page_size=4, debug=True
    )


def write(engine: Engine, seed: int, **settings: object) -> Completion:
    sampling = SamplingParams(temperature=1.0, seed=seed, max_tokens=200, **settings)  # type: ignore[arg-type]
    return engine.generate([Request(list(b"Why?"), sampling=sampling)])[0]


@pytest.mark.parametrize("seed", range(8))
def test_a_random_model_obeys(engine: Engine, seed: int) -> None:
    """Its own text would be noise: what is not is the grammar's doing."""
    made = write(engine, seed, json_schema=SCHEMA)
    assert made.finish_reason == "stop"
    value = json.loads(made.text)
    assert value["kind"] in ("cat", "dog")
    assert value["legs"] <= 8
    assert re.fullmatch("(ab|c)+d", write(engine, seed, regex="(ab|c)+d").text)
    assert re.fullmatch("<[a-z]{1,3}(,[a-z]{1,3})*>", write(engine, seed, lark=LARK).text)
    free = write(engine, seed)
    assert not free.text.startswith("{")


def test_each_answer_has_its_own_place_in_the_grammar(engine: Engine) -> None:
    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=100, regex="[a-f]{3}(0|1){2}")
    requests = [Request(list(b"Why?"), sampling=sampling, n=4), Request([5], sampling=sampling)]
    for answers in engine.generate_all(requests):
        for answer in answers:
            assert re.fullmatch("[a-f]{3}(0|1){2}", answer.text)


def test_an_answer_cut_off_is_a_beginning(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=3, regex="abcdefgh")
    (made,) = engine.generate([Request([1], sampling=sampling)])
    assert (made.text, made.finish_reason) == ("abc", "length")


def test_reported_log_probabilities_are_the_model_s(engine: Engine) -> None:
    (made,) = engine.generate([Request([9, 8], sampling=SamplingParams(regex="abc"))])
    (scored,) = engine.generate([Request([9, 8], forced_tokens=made.tokens)])
    assert made.logprobs == scored.logprobs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(regex="("), "regex: "),
        (dict(json_schema={"type": "obj"}), "json_schema: "),
        (dict(json_schema="{"), "json_schema: "),
        (dict(lark="start: NOWHERE"), "lark: "),
    ],
)
def test_grammars_that_make_no_sense(engine: Engine, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        write(engine, 0, **settings)
    assert len(str(caught.value)) < 500
    assert len(engine) == 0
    assert write(engine, 0, regex="ab").text == "ab"


def test_without_a_tokenizer_there_is_no_grammar(model: LanguageModel) -> None:
    bare = Engine(model.decoder, model.stop_tokens)
    for settings in (dict(regex="a"), dict(stop="a")):
        with pytest.raises(InputError, match="need an engine with a tokenizer"):
            bare.generate([Request([1], sampling=SamplingParams(**settings))])  # type: ignore[arg-type]


def test_few_are_kept(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fssa_runtime.engine.grammar._MAX_KEPT", 2)
    grammars = Grammars(model.copy_tokenizer(), model.decoder.config.vocab_size, {257})
    for letter in "abcab":
        logits = torch.zeros(model.decoder.config.vocab_size)
        grammars.compiled(("regex", letter)).matcher().rule_out(logits)
        assert (logits == 0).nonzero().flatten().tolist() == [
            model.tokenizer(letter)["input_ids"][0]
        ]
    assert len(grammars._kept) == 2


def test_nobody_waits_for_another_s_grammar(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And who asks for one that is being compiled waits for that, instead of compiling it too."""
    grammars = Grammars(model.copy_tokenizer(), model.decoder.config.vocab_size, {257})
    compile_, begun, go_on = grammars._compile, threading.Event(), threading.Event()
    compiled = []

    def slow(kind: str, text: str) -> Grammar:
        compiled.append(text)
        if text == "slow":
            begun.set()
            assert go_on.wait(60)
        return compile_(kind, text)

    monkeypatch.setattr(grammars, "_compile", slow)
    quick = grammars.compiled(("regex", "quick"))
    with ThreadPoolExecutor() as pool:
        first = pool.submit(grammars.compiled, ("regex", "slow"))
        try:
            assert begun.wait(60)
            second = pool.submit(grammars.compiled, ("regex", "slow"))
            assert pool.submit(grammars.compiled, ("regex", "quick")).result(60) is quick
            pool.submit(grammars.compiled, ("regex", "another")).result(60)
            assert not first.done()
        finally:
            go_on.set()
        assert first.result(60) is second.result(60)
    assert compiled == ["quick", "slow", "another"]


def test_a_grammar_that_failed_is_tried_again(model: LanguageModel) -> None:
    grammars = Grammars(model.copy_tokenizer(), model.decoder.config.vocab_size, {257})
    for _ in range(2):
        with pytest.raises(InputError, match="regex: "):
            grammars.compiled(("regex", "("))
    assert not grammars._kept


def test_what_was_checked_is_not_compiled_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where the request is added nor where its other answers begin, kept or not."""
    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=100, regex="[a-f]{3}")
    request = Request(list(b"Why?"), sampling=sampling, n=3)
    grammar = engine.check(request)
    gathering = Gathering(request)
    monkeypatch.setattr(engine._admission, "_grammars", Grammars(None, 0, ()))
    engine.add(request, grammar)
    while len(engine):
        for event in engine.step():
            gathering.take(event)
    for answer in gathering.completions():
        assert re.fullmatch("[a-f]{3}", answer.text)
