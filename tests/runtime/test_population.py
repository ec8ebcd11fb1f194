"""Sampled answers, the population that chooses between them, and what it writes."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from fssa_runtime.errors import InputError
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.training.answers import (
    AnswerConfig,
    read_answers,
    read_prompts,
    sample_answers,
)
from fssa_runtime.training.data import Preference, read_preferences, split_preferences
from fssa_runtime.training.population import (
    NamedUsersConfig,
    PopulationConfig,
    build_named_users,
    build_preferences,
    candidates,
    heldout_answers,
    known_weights_accuracy,
    simulate,
    usable_answer,
    user_weights,
    write_preferences,
)
from fssa_runtime.training.reward_recipe import PreferenceFiles
from fssa_runtime.training.tastes import TasteScale, utility

from .conditioned import small_model

ANSWERS = {
    f"question {i}": ["Short one here.", "- a\n- b\n- c", "A much longer answer. " * 6]
    for i in range(20)
}


def records() -> list[dict[str, str]]:
    return [
        {"prompt": prompt, "style": str(i), "answer": text, "finish_reason": "stop"}
        for prompt, texts in ANSWERS.items()
        for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize(
    ("answer", "reason", "expected"),
    [
        ("One two three.", "stop", "One two three."),
        ("One two three. And then it", "length", "One two three."),
        ("Items:\n1. one two\n2. three", "length", "Items:\n1. one two"),
        ("Items are:\n1. one\n2.", "length", "Items are:\n1. one"),
        ("never ending words without any stop", "length", None),
        ("two words", "stop", None),
        ("go on " * 30, "stop", None),
    ],
)
def test_usable_answers(answer: str, reason: str, expected: str | None) -> None:
    assert usable_answer(answer, reason, 3) == expected


def test_candidates_are_distinct_and_at_least_two() -> None:
    rows = [
        {"prompt": "p", "style": "a", "answer": "one two three", "finish_reason": "stop"},
        {"prompt": "p", "style": "b", "answer": "one two three", "finish_reason": "stop"},
        *records()[:3],
    ]
    assert candidates(rows, 3) == {"question 0": [t.strip() for t in ANSWERS["question 0"][:2]]} | {
        "question 0": candidates(records()[:3], 3)["question 0"]
    }


def test_choices_follow_the_hidden_weights_with_the_right_noise() -> None:
    texts = {p: ["word " * 3, "and other words " * 5] for p in ANSWERS}
    scale = TasteScale.fit([t for both in texts.values() for t in both], ["length"])
    weights = {"length": 0.5}
    gap = utility(weights, texts["question 0"][1], scale) - utility(
        weights, texts["question 0"][0], scale
    )
    assert simulate(texts, {"u": weights}, scale, choices_per_user=0, seed=0) == []
    chosen = simulate(texts, {"u": weights}, scale, choices_per_user=4000, seed=0)
    share = sum(c.chosen == texts["question 0"][1] for c in chosen) / len(chosen)
    assert gap > 0.5
    assert abs(share - 1 / (1 + math.exp(-gap))) < 0.03


def test_pairs_differ_in_every_taste() -> None:
    plain, listed = "some words in a row", "1. one thing\n2. another thing\n3. the last thing"
    longer = "some more words that stand in one row and go on for quite a while"
    texts = {"both": [plain, listed, longer], "neither": [plain, longer]}
    scale = TasteScale.fit([plain, listed, longer], ["length", "lists"])
    weights = {"length": 1.0}
    chosen = simulate(
        texts, {"u": weights}, scale, choices_per_user=200, seed=0, min_difference=0.1
    )
    assert {c.prompt for c in chosen} == {"both"}
    assert all(listed in (c.chosen, c.rejected) for c in chosen)
    with pytest.raises(InputError, match=r"differ by 9\.0 in every taste"):
        simulate(texts, {"u": weights}, scale, choices_per_user=2, seed=0, min_difference=9.0)


def test_population_is_reproducible_and_has_pure_users(tmp_path: Path) -> None:
    config = PopulationConfig(
        tastes=("length", "lists"), num_users=30, choices_per_user=25, strength=2.0, pure=0.5
    )
    weights = user_weights(config)
    pure = sum(0.0 in user.values() for user in weights.values())
    assert 5 < pure < 25
    assert all(math.isclose(math.hypot(*user.values()), 2.0) for user in weights.values())
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_preferences(build_preferences(records(), config)[0], tmp_path / name)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    data = read_preferences(tmp_path / "a.jsonl.gz")
    assert len(data) == 30 * 25
    prompts = [p.prompt for p in data.preferences if p.user == "user0000"]
    assert len(set(prompts)) == 20  # every prompt once before any twice
    first = gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).splitlines()[0]
    assert json.loads(first)["user"] == "user0000"


def test_simulated_users_choose_where_nothing_was_trained(tmp_path: Path) -> None:
    config = PopulationConfig(tastes=("length",), num_users=30, choices_per_user=25, strength=2.0)
    path = tmp_path / "choices.jsonl"
    write_preferences(build_preferences(records(), config)[0], path)
    data = read_preferences(path)
    split = split_preferences(data, heldout_users=0.2, heldout_prompts=0.3, seed=0)
    trained = {data.preferences[row].prompt for row in split.train}
    files = PreferenceFiles(kind="preferences", files=(path,), heldout_prompts=0.3)
    expected = {prompt: texts for prompt, texts in ANSWERS.items() if prompt not in trained}
    assert heldout_answers(files, ANSWERS) == expected
    assert len(expected) == 6
    named = NamedUsersConfig(
        population=config, data=files, users={"ann": {"length": 2.0}}, num_choices=6
    )
    (ann,) = build_named_users(records(), named)
    assert {choice.prompt for choice in ann.choices} == set(expected)


def test_unknown_taste_and_nothing_to_choose() -> None:
    config = PopulationConfig(tastes=("taste",), num_users=1, choices_per_user=1, strength=1.0)
    with pytest.raises(InputError, match="unknown"):
        build_preferences(records(), config)
    config = config.model_copy(update={"tastes": ("length",)})
    with pytest.raises(InputError, match="two usable"):
        build_preferences(records()[:1], config)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small_model(tmp_path_factory.mktemp("answers") / "model")


def test_sampling_goes_on_where_it_stopped(model: LanguageModel, tmp_path: Path) -> None:
    config = AnswerConfig(styles={"plain": "{prompt}", "loud": "{prompt}!"}, max_tokens=6)
    prompts = ["a b", "c d", "e f"]
    sample_answers(model, prompts, config, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    # Runs killed in the middle of their third line, and between it and its end.
    lines = whole.splitlines(keepends=True)
    for name, last, num_whole in (("cut", lines[2][:7], 2), ("unended", lines[2][:-1], 3)):
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(b"".join(lines[:2]) + last)
        assert len(read_answers(path)) == num_whole
        assert path.read_bytes().endswith(last), "written by reading"
        sample_answers(model, prompts, config, path)
        assert len(path.read_bytes().splitlines()) == 6

    def key(record: dict) -> tuple[str, str]:
        return record["prompt"], record["style"]

    expected = sorted(read_answers(tmp_path / "whole.jsonl"), key=key)
    assert len(expected) == 6
    for name in ("cut", "unended"):
        assert sorted(read_answers(tmp_path / f"{name}.jsonl"), key=key) == expected


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "p.txt").write_text("a\n\na\n")
    with pytest.raises(InputError, match="twice"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(InputError, match="empty"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:1"):
        read_answers(tmp_path / "a.jsonl")


def test_who_knows_the_weights_predicts_what_is_not_noise() -> None:
    def predictable(sign: float = 1.0, **settings: float) -> float:
        config = PopulationConfig(
            tastes=("lists",), num_users=40, choices_per_user=40, min_difference=0.3, **settings
        )
        preferences, scale = build_preferences(records(), config)
        users = {
            name: {taste: sign * value for taste, value in weights.items()}
            for name, weights in user_weights(config).items()
        }
        return known_weights_accuracy(preferences, users, scale)

    assert predictable(strength=1000.0) == 1.0
    assert predictable(-1.0, strength=1000.0) == 0.0
    assert 0.45 < predictable(strength=0.01) < 0.55


def test_between_answers_of_one_utility_who_knows_the_weights_is_right_half_the_time() -> None:
    """Whichever of them was chosen; neither has a list, which is all that counts here."""
    short, long, listed = "some words", "some more words in a longer row", "- one\n- two\n- three"
    scale = TasteScale.fit([short, long, listed], ["lists"])

    def predictable(*chosen_and_rejected: tuple[str, str]) -> float:
        preferences = [Preference("u", "p", *both) for both in chosen_and_rejected]
        return known_weights_accuracy(preferences, {"u": {"lists": 2.0}}, scale)

    assert predictable((short, long)) == predictable((long, short)) == 0.5
    assert predictable((listed, short), (short, long)) == 0.75
    assert predictable((short, listed), (short, long)) == 0.25
