"""Tastes: hand-computed values, and properties over arbitrary strings."""

import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fssa_runtime.training import tastes
from fssa_runtime.training.tastes import (
    TASTES,
    TasteScale,
    describe,
    has_loop,
    measure,
    repetition,
    utility,
)

BOUNDS = {
    "length": (0, math.inf),
    "lists": (0, 1),
    "enthusiasm": (0, 3),
    "questions": (0, 1),
    "formality": (-1, 1),
}

no_deadline = settings(deadline=None)  # the machine may be busy

# Arbitrary text rarely has a list, a sentence or a contraction: build some from parts as well.
parts = st.sampled_from(
    [
        *("I ", "don't ", "You ", "therefore ", "responsibility ", "e.g. ", "Dr. ", "3.5 ", "é "),
        *("- ", "1. ", "a) ", "**2.** ", "\n", "\r\n", "\u2028", "\t", "—", "🙂", "e\u0301 "),
        *(". ", "! ", "? ", "!!!!! ", "?! ", "… ", '." ', "。", "؟ ", "\ud800", "\x00"),
    ]
)
any_text = st.one_of(st.text(), st.lists(parts, max_size=40).map("".join))
weights_strategy = st.dictionaries(
    st.sampled_from(sorted(TASTES)), st.floats(-5, 5, allow_nan=False), max_size=len(TASTES)
)


def value(name: str, text: str) -> float:
    return measure(text, [name])[0]


def test_the_registry_names_each_taste_after_its_key() -> None:
    assert list(TASTES) == ["length", "lists", "enthusiasm", "questions", "formality"]
    assert all(name == taste.name for name, taste in TASTES.items())
    assert len({phrase for t in TASTES.values() for phrase in (t.low, t.high)}) == 10


@pytest.mark.parametrize("name", TASTES)
@pytest.mark.parametrize("text", ["", " \n\t \u2028", "...", "-", "---\n\n* * *", "?!", "🙂"])
def test_texts_without_a_word_measure_zero(name: str, text: str) -> None:
    assert value(name, text) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("One.", 1),
        ("One two, three!", 3),
        ("A well-known  don't\ncounts — as 3.5 words", 7),
        ("left—right", 2),
        ("- red\n- green\n3. blue", 3),  # the markers are no words
        ("Über straße", 2),
        ("e\u0301te\u0301 fini", 2),
    ],
)
def test_length_is_the_log_of_the_word_count(text: str, words: int) -> None:
    assert value("length", text) == pytest.approx(math.log(1 + words))


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("Plain prose.", 0),
        ("- a\n- b", 1),
        ("Here:\n\n1. a\n2) b\n(3) c", 3 / 4),
        ("Here:\n* a\n• b\n  + c\n– d\na) e", 5 / 6),
        ("**1.** bold\n**2. Bold** too\n- **Bold** three\nEnd", 3 / 4),
        ("-1 is negative\n3.5 litres\n*stress* here\n**bold**\n2020. A year", 0),
        ("A. Turing was born\nI think", 0),  # initials and pronouns
        ("- \n---\n* * *\n- x", 1 / 4),  # an empty item and rules are lines but not items
        ("First 1. one 2. two", 0),
        ("- a\r\nb", 1 / 2),
    ],
)
def test_lists_is_the_share_of_item_lines(text: str, share: float) -> None:
    assert value("lists", text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Calm. Very calm.", 0),
        ("Great!", 1),
        ("Great! Fine. Good.", 1 / 3),
        ("Wow!! Ok.", 1),
        ("Wow!!!!!!!!!! Ok.", 3 / 2),  # capped at 3 in a sentence
        ("Really?! Yes.", 1 / 2),
        ("Nice!🙂 Good.", 1 / 2),
        ("**Go!** Now.", 1 / 2),
        ("Ha!Ha! Yes.", 1),  # marks inside a sentence count
        ("太好了！走吧。", 1 / 2),
        ("- Yes!\n- no\n- maybe", 1 / 3),  # a line ends a sentence
    ],
)
def test_enthusiasm_is_capped_exclamations_per_sentence(text: str, score: float) -> None:
    assert value("enthusiasm", text) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("No. Never!", 0),
        ("Why?", 1),
        ("Why? Because. So?", 2 / 3),
        ("What?! I see.", 1 / 2),
        ('He asked "Why?" Nobody knew.', 1 / 2),
        ("See a/b?c=1 for more.", 0),  # not at the end of a word
        ('"Why?" she asked. So it was.', 1 / 3),  # unlike dots, ends before a lower-case letter
        ("Dr. Who met Prof. X, e.g. Paris at 3.5 p.m. today. Did he?", 1 / 2),  # two sentences
        ("Hmm... is it… so? Maybe... Yes.", 1 / 3),
        ("Is it?\nIt is\nIs it", 1 / 3),
        ("1. Is it?\n2. It is.", 1 / 2),
        ("Vraiment ？ Oui。هل؟ نعم.", 1 / 2),
    ],
)
def test_questions_is_the_share_of_asking_sentences(text: str, share: float) -> None:
    assert value("questions", text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("The cat sat.", 0),
        ("Your cat", -1 / 12),
        ("Yeah", -1 / 11),
        ("You don’t", -2 / 12),  # a curly apostrophe
        ("We'll see: they've gone, he'd say I'm right", -4 / 18),
        ("It's Anna's cat", -1 / 13),  # the possessive is neutral
        ("You're", -1 / 11),  # two reasons, one word
        ("Therefore, it rained", 1 / 13),
        ("Consequently", 1 / 11),  # a connective counts in full although it is long
        ("important", 0.25 / 11),  # nine letters
        ("relevant", 0),  # eight
        ("You agree; however, understanding differs", (-1 + 1 + 0.25) / 15),
    ],
)
def test_formality_scores_words_by_the_documented_table(text: str, score: float) -> None:
    assert value("formality", text) == pytest.approx(score)


def test_every_listed_word_is_in_the_form_the_words_of_a_text_take() -> None:
    for listed, sign in ((tastes._CASUAL, -1), (tastes._CONNECTIVES, 1)):
        for word in listed:
            assert value("formality", word.capitalize() + ",") == pytest.approx(sign / 11), word


@no_deadline
@given(any_text)
def test_measures_are_finite_bounded_and_repeatable(text: str) -> None:
    for name, (low, high) in BOUNDS.items():
        got = value(name, text)
        assert isinstance(got, float)
        assert math.isfinite(got)
        assert low <= got <= high
        assert value(name, text) == got
    assert 0 <= repetition(text) < 1
    assert isinstance(has_loop(text), bool)


@no_deadline
@given(any_text)
def test_length_grows_by_one_word(text: str) -> None:
    grown = math.expm1(value("length", text + "\nword"))
    assert grown == pytest.approx(math.expm1(value("length", text)) + 1)


@no_deadline
@given(any_text)
def test_an_added_item_raises_lists_unless_all_are_items(text: str) -> None:
    before, after = value("lists", text), value("lists", text + "\n- item")
    assert after > before or before == after == 1


@no_deadline
@given(any_text)
def test_an_added_plain_line_lowers_lists_unless_none_are_items(text: str) -> None:
    before, after = value("lists", text), value("lists", text + "\nplain")
    assert after < before or before == after == 0


@no_deadline
@given(any_text, st.integers(0, 10))
def test_enthusiasm_is_monotone_in_the_marks_and_stops_at_three(text: str, marks: int) -> None:
    less, more = (value("enthusiasm", f"{text}\nyes{'!' * m}") for m in (marks, marks + 1))
    assert more > less if marks < 3 else more == less


@no_deadline
@given(any_text)
def test_an_added_question_raises_questions_and_a_statement_lowers_it(text: str) -> None:
    before = value("questions", text)
    asked, told = value("questions", text + "\nOr not?"), value("questions", text + "\nNot.")
    assert asked > before or before == asked == 1
    assert told < before or before == told == 0


@no_deadline
@given(any_text)
def test_formality_falls_with_you_and_rises_with_therefore(text: str) -> None:
    before = value("formality", text)
    assert value("formality", text + "\nyou") < before < value("formality", text + "\ntherefore")


@no_deadline
@given(any_text)
def test_list_markers_change_no_words(text: str) -> None:
    lines = ["xy" + line for line in text.splitlines()]  # so that no line has a marker of its own
    plain, listed = "\n".join(lines), "\n".join(f"{i % 999}. {x}" for i, x in enumerate(lines))
    for name in ("length", "formality"):
        assert value(name, plain) == value(name, listed)


def test_measure_keeps_the_order_of_the_names() -> None:
    assert measure("Why? Oh!", ["questions", "lists", "enthusiasm"]) == [0.5, 0.0, 0.5]


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match=r"names: .*'lists'.*got \['colour'\]"):
        measure("x", ["length", "colour"])
    with pytest.raises(ValueError, match=r"names: expected distinct"):
        measure("x", ["length", "length"])
    with pytest.raises(ValueError, match=r"names: .*at least one"):
        measure("x", [])
    with pytest.raises(TypeError, match=r"names: .*'length'"):
        measure("x", "length")


@pytest.mark.parametrize("judge", [repetition, has_loop, lambda text: measure(text, ["length"])])
def test_a_text_must_be_a_string(judge) -> None:
    with pytest.raises(TypeError, match=r"text: expected a string; got NoneType"):
        judge(None)


def test_fit_takes_mean_and_population_deviation() -> None:
    scale = TasteScale.fit(["Why?", "Why? So.", "No.", "- No."], ["questions", "lists"])
    assert scale.names == ("questions", "lists")
    assert scale.mean == pytest.approx((3 / 8, 1 / 4))
    # questions 1, 1/2, 0, 0: mean square 5/16; lists 0, 0, 0, 1: mean square 1/4
    assert scale.std == pytest.approx((math.sqrt(5 / 16 - 9 / 64), math.sqrt(3 / 16)))
    assert scale.standardise("Why?") == pytest.approx(
        [(1 - 3 / 8) / math.sqrt(11 / 64), -(1 / 4) / math.sqrt(3 / 16)]
    )


@no_deadline
@given(st.lists(any_text, min_size=1, max_size=8))
def test_a_corpus_has_mean_zero_and_deviation_one_on_its_own_scale(texts: list[str]) -> None:
    scale = TasteScale.fit(iter(texts), list(TASTES))
    for k, column in enumerate(zip(*map(scale.standardise, texts), strict=True)):
        assert math.fsum(column) / len(texts) == pytest.approx(0, abs=1e-6)
        deviation = math.sqrt(math.fsum(x * x for x in column) / len(texts))
        varies = len({measure(text, scale.names)[k] for text in texts}) > 1
        assert deviation == pytest.approx(1 if varies else 0, abs=1e-6)


def test_a_taste_without_variation_is_only_centred() -> None:
    texts = ["1 2 3 4 5", "a b c d e", "v w x y z"]
    assert math.fsum([math.log(6)] * 3) / 3 != math.log(6)  # rounding is no variation
    scale = TasteScale.fit(texts, ["length"])
    assert scale.std == (1.0,)
    assert scale.standardise("a b") == pytest.approx([math.log(3) - math.log(6)])


def test_fit_refuses_what_is_no_corpus() -> None:
    with pytest.raises(TypeError, match=r"texts: expected several strings"):
        TasteScale.fit("one text", ["length"])
    with pytest.raises(ValueError, match=r"texts: expected at least one"):
        TasteScale.fit([], ["length"])
    with pytest.raises(ValueError, match=r"got \['colour'\]"):
        TasteScale.fit([], ["colour"])


def test_a_scale_survives_json() -> None:
    scale = TasteScale.fit(["Oh! 1/3.", "Why? Why? No.", "You there"], list(TASTES))
    assert TasteScale.from_dict(json.loads(json.dumps(scale.to_dict()))) == scale


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["length", "colour"]}, r"names: .*colour"),
        ({"names": ["length", "length"]}, r"names: expected distinct"),
        ({"mean": [0.0]}, r"mean: expected 2 numbers"),
        ({"std": [1.0, 1.0, 1.0]}, r"std: expected 2 numbers"),
        ({"mean": [0.0, math.nan]}, r"mean: expected finite"),
        ({"std": [1.0, math.inf]}, r"std: expected finite"),
        ({"std": [1.0, 0.0]}, r"std: expected positive"),
        ({"scale": 1}, r"data: expected the keys"),
    ],
)
def test_a_broken_scale_is_refused(change: dict, message: str) -> None:
    good = {"names": ["length", "lists"], "mean": [0.0, 0.0], "std": [1.0, 1.0]}
    TasteScale.from_dict(good)
    with pytest.raises(ValueError, match=message):
        TasteScale.from_dict(good | change)
    with pytest.raises(ValueError, match=r"data: expected the keys"):
        TasteScale.from_dict({"names": ["length"], "mean": [0.0]})


def test_utility_is_the_weighted_sum_of_standardised_tastes() -> None:
    scale = TasteScale(("questions", "lists", "enthusiasm"), (0.5, 0.25, 0.0), (0.5, 0.25, 2.0))
    text = "- Why?\n- Oh!\nRight?\nWell."  # questions 1/2, lists 1/2, enthusiasm 1/4
    assert utility({"lists": 2, "enthusiasm": -4}, text, scale) == pytest.approx(2 * 1 - 4 / 8)
    assert utility({"questions": 7}, text, scale) == pytest.approx(0)
    assert utility({}, text, scale) == 0


@no_deadline
@given(weights_strategy, any_text, st.floats(-3, 3))
def test_utility_is_linear_in_the_weights(weights: dict, text: str, factor: float) -> None:
    scale = TasteScale.fit(["Oh! You!", "Why?", "- a\n- b", "Therefore it rains."], list(TASTES))
    scaled = {name: factor * weight for name, weight in weights.items()}
    assert utility(scaled, text, scale) == pytest.approx(
        factor * utility(weights, text, scale), abs=1e-9
    )
    assert sum(utility({n: w}, text, scale) for n, w in weights.items()) == pytest.approx(
        utility(weights, text, scale), abs=1e-9
    )


def test_weights_are_checked() -> None:
    scale = TasteScale(("length",), (0.0,), (1.0,))
    with pytest.raises(ValueError, match=r"weights: .*'formality'.*got \['colour'\]"):
        utility({"colour": 1}, "x", scale)
    with pytest.raises(ValueError, match=r"tastes of the scale, \['length'\]; got \['lists'\]"):
        utility({"length": 1, "lists": 1}, "x", scale)
    with pytest.raises(ValueError, match=r"weights: expected finite"):
        utility({"length": math.nan}, "x", scale)
    with pytest.raises(ValueError, match=r"got \['colour'\]"):
        describe({"colour": 1})
    with pytest.raises(ValueError, match=r"weights: expected finite"):
        describe({"length": math.inf})


@pytest.mark.parametrize(
    ("weights", "phrase"),
    [
        ({"length": -1, "lists": 1}, "short, lists"),
        ({"lists": -1, "length": 1}, "prose, long"),
        ({"formality": 1, "enthusiasm": -2}, "calm, formal"),
        ({"formality": -0.5, "questions": 0.0}, "casual (mildly)"),
        ({"enthusiasm": 0.2, "questions": -0.7}, "no questions, enthusiastic (mildly)"),
        ({"length": math.sqrt(0.5), "lists": math.sqrt(0.5)}, "long, lists"),
        ({"length": 0}, "no preference"),
        ({}, "no preference"),
    ],
)
def test_describe(weights: dict, phrase: str) -> None:
    assert describe(weights) == phrase


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        ("one two three", 0),
        ("a b c a b c", 0),  # three words in common are not enough
        ("a b c d a b c d", 1 / 5),
        ("The end is near. The END, is near!", 1 / 5),  # case and punctuation do not hide it
        ("caf\u00e9 a b c cafe\u0301 a b c", 1 / 5),  # two encodings of one word
        ("no " * 10, 6 / 7),
        ("- a b c d\n- a b c d", 1 / 5),
    ],
)
def test_repetition_is_the_share_of_repeated_word_4_grams(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share)


@no_deadline
@given(st.lists(st.text("abcdef", min_size=1), unique=True, min_size=1))
def test_repetition_is_zero_for_distinct_words_and_grows_with_copies(words: list[str]) -> None:
    text = " ".join(words)
    assert repetition(text) == 0
    copies = [repetition("\n".join([text] * n)) for n in range(1, 6)]
    assert copies == sorted(copies)
    assert copies[-1] > 0


@pytest.mark.parametrize(
    "text",
    [
        "I like it. " * 3,
        "We begin. And so on and so on and so on",
        "The cat sat.\nThe cat sat.\nThe cat sat.",
        "1. Drink water.\n2. Drink water.\n3. Drink water.",
        "Go now, go NOW, Go now!",
        "a b c d c d c d c",  # cut after a whole word of the fourth copy
        "It was a fine day. It was a fine day. It was a fine day. It was a fi",  # and within one
        "1. Eat good food\n2. Eat good food\n3. Eat good food\n4. Eat go",
        "Fine" + "!" * 24,
        "ha" * 12,
        "好" * 24,
    ],
)
def test_a_tail_repeated_three_times_is_a_loop(text: str) -> None:
    assert has_loop(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "one",
        "I like it. I like it.",  # twice
        "so so so it went on",  # not at the tail
        "1. Drink water.\n2. Eat fruit.\n3. Drink water.\n4. Eat fruit.\n5. Sleep.",
        "Oh nooooo!!!",
        "ha" * 11,
        "The price is 1000000",
        "a b a b a",  # two and a half copies
    ],
)
def test_other_tails_are_no_loop(text: str) -> None:
    assert not has_loop(text)


@no_deadline
@given(any_text, st.text("ab ", min_size=1).filter(str.strip), st.integers(3, 6))
def test_three_copies_of_any_line_are_a_loop_and_a_new_word_ends_it(
    text: str, line: str, copies: int
) -> None:
    looped = text + f"\n{line}" * copies
    assert has_loop(looped)
    assert not has_loop(looped + "\nzebra")


@no_deadline
@given(st.text("ab", max_size=14))
def test_has_loop_agrees_with_trying_every_period(letters: str) -> None:
    """Against the definition: the last 3 p words are three times the same p words."""
    words = list(letters)
    n = len(words)
    expected = any(
        words[n - p :] == words[n - 2 * p : n - p] == words[n - 3 * p : n - 2 * p]
        for p in range(1, n // 3 + 1)
    )
    assert has_loop(" ".join(words)) is expected


# The last of these (Thue-Morse) is full of squares and has no cube: the search for loops is
# kept busy and finds none.
@pytest.mark.parametrize(
    "text",
    [
        *((unit * 200_000)[:200_000] + "c" for unit in ("a ", ".", "dr. ", "!x", "ab", "1. ")),
        *((unit * 200_000)[:200_000] + "c" for unit in ("(\"'", "- a\n", " \t")),
        " ".join("ab"[i.bit_count() % 2] for i in range(100_000)),
    ],
    ids=lambda text: text[:4].strip(),
)
def test_the_time_is_about_linear_in_the_text(text: str) -> None:
    """A quadratic step would take minutes on these 200,000 characters, and not a second."""
    start = time.perf_counter()
    measure(text, list(TASTES))
    repetition(text)
    has_loop(text)
    assert time.perf_counter() - start < 20
