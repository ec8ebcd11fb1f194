"""What may be asked of an answer, and what a model's own file recommends."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from fssa_runtime.errors import InputError
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.request import Request
from fssa_runtime.sampling import GREEDY, SamplingParams, from_generation_config

from .models import write_model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_tokens=0), "max_tokens must be at least 1, got 0"),
        (dict(temperature=-1.0), "temperature must be finite and >= 0"),
        (dict(temperature=math.nan), "temperature must be finite"),
        (dict(top_k=-1), "top_k must be >= 0"),
        (dict(top_p=0.0), r"top_p must be in \(0, 1\]"),
        (dict(min_p=1.5), r"min_p must be in \[0, 1\]"),
        (dict(repetition_penalty=0.0), "repetition_penalty must be finite and above 0"),
        (dict(presence_penalty=math.inf), "presence_penalty must be finite"),
        (dict(frequency_penalty=math.nan), "frequency_penalty must be finite"),
        (dict(logit_bias={3: math.nan}), "logit_bias of token 3 must be a number"),
        (dict(logit_bias=dict.fromkeys(range(2000), 1.0)), "logit_bias: at most 1000 tokens"),
        (dict(stop=""), "stop: expected strings of 1 to 1000 characters, got one of 0"),
        (dict(stop=[7]), "stop: expected strings .* got int"),
        (dict(stop=["x"] * 17), "stop: at most 16 strings, got 17"),
        (dict(min_tokens=-1), r"min_tokens must be in 0..max_tokens"),
        (dict(min_tokens=9, max_tokens=8), r"min_tokens must be in 0..max_tokens"),
        (dict(top_logprobs=21), r"top_logprobs must be in 0..20"),
        (dict(prompt_logprobs=-1), r"prompt_logprobs must be in 0..20"),
        (dict(regex="a", lark="b"), "expected one of regex and lark, got both"),
        (dict(regex=""), "regex: expected 1 to 100000 characters, got 0"),
        (dict(json_schema={"type": {1, 2}}), "json_schema: expected what JSON can hold"),
        (dict(regex="a", ignore_eos=True), "regex and ignore_eos"),
        # What one request gets wrong may not come up in a step, which is everybody's.
        (dict(max_tokens=1.5), "max_tokens must be an integer, got float"),
        (dict(min_tokens="2"), "min_tokens must be an integer, got str"),
        (dict(top_k=2.0), "top_k must be an integer, got float"),
        (dict(top_k=True), "top_k must be an integer, got bool"),
        (dict(top_k=2**31), "top_k must be .* at most 2147483647, got 2147483648"),
        (dict(seed=0.5), "seed must be an integer, got float"),
        (dict(seed=2**64), "seed must be a number of at most 64 bits"),
        (dict(top_logprobs=1.5), "top_logprobs must be an integer, got float"),
        (dict(prompt_logprobs="all"), "prompt_logprobs must be an integer, got str"),
        (dict(stop_token_ids=[1, 2.5]), "stop_token_ids must be integers, got float"),
        (dict(stop_token_ids=7), "stop_token_ids: expected a collection, got int"),
        (dict(stop=7), "stop: expected a collection, got int"),
        (dict(logit_bias={"7": 1.0}), "tokens of logit_bias must be integers, got str"),
        (dict(logit_bias={7: "1"}), "logit_bias of token 7 must be a number, got str"),
        (dict(logit_bias=[7]), "logit_bias: expected a mapping, got list"),
        (dict(temperature="hot"), "temperature must be a number, got str"),
        (dict(top_p=None), "top_p must be a number, got NoneType"),
        (dict(repetition_penalty=[1]), "repetition_penalty must be a number, got list"),
    ],
)
def test_values_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingParams(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(n=0), "n must be at least 1"),
        (dict(n=129), "n must be at least 1 and at most 128"),
        (dict(n=3, best_of=2), "best_of must be at least n = 3"),
        (dict(best_of=129), "best_of must be"),
        (dict(timeout=0.0), "timeout must be positive"),
        (dict(timeout=math.nan), "timeout must be positive"),
        (dict(timeout="soon"), "timeout must be a number, got str"),
        (dict(n=1.5), "n must be an integer, got float"),
        (dict(n=True), "n must be an integer, got bool"),
        (dict(best_of="2"), "best_of must be an integer, got str"),
        (dict(priority="high"), "priority must be an integer, got str"),
        (dict(priority=None), "priority must be an integer, got NoneType"),
        (dict(tenant=["ana"]), "tenant must be hashable"),
    ],
)
def test_requests_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Request([1], **settings)


def test_tokens_may_come_from_an_array() -> None:
    tokens = np.array([1, 2])
    assert Request(list(tokens), sampling=SamplingParams(stop_token_ids=tokens)).num_answers == 1


def test_settings_are_nobody_else_s_to_change() -> None:
    bias, stop = {3: 1.0}, ["end"]
    settings = SamplingParams(logit_bias=bias, stop=stop)
    bias[10**6], stop[0] = 2.0, ""
    assert settings == SamplingParams(logit_bias={3: 1.0}, stop="end")


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="end") == SamplingParams(stop=["end"])
    assert SamplingParams(json_schema={"type": "object"}).grammar == (
        "json_schema",
        '{"type": "object"}',
    )
    assert SamplingParams(json_schema=False).grammar == ("json_schema", "false")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, GREEDY),
        ({"temperature": 0.6, "top_p": 0.9}, GREEDY),  # nobody said that it should sample
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20},
            SamplingParams(temperature=0.6, top_p=0.9, top_k=20),
        ),
        ({"do_sample": True}, SamplingParams(temperature=1.0)),
        (
            {"repetition_penalty": 1.05, "max_new_tokens": 2048, "min_p": 0.1},
            SamplingParams(repetition_penalty=1.05, max_tokens=2048),
        ),
        ({"do_sample": True, "top_p": 7.0, "top_k": "many"}, SamplingParams(temperature=1.0)),
        ({"repetition_penalty": None}, GREEDY),
    ],
)
def test_what_a_model_recommends(config: dict, expected: SamplingParams) -> None:
    assert from_generation_config(config) == expected


def test_generation_config_is_read_with_the_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    file = folder / "generation_config.json"
    recommended = {"do_sample": True, "temperature": 0.5, "eos_token_id": [257, 300]}
    file.write_text(json.dumps(recommended), encoding="utf-8")
    model = LanguageModel.load(str(folder))
    assert model.default_sampling == SamplingParams(temperature=0.5)
    assert model.stop_tokens == {257, 300}
    file.unlink()
    assert LanguageModel.load(str(folder)).default_sampling == GREEDY
    for text in ("{", "[]"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"generation_config\.json"):
            LanguageModel.load(str(folder))
