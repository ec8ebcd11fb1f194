"""Text as it comes: never what a later token would have changed, and ended by the first stop."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fssa_runtime.engine.text import TextStream

from .models import byte_tokenizer

TOKENIZER = byte_tokenizer().backend_tokenizer


def tokens_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@settings(deadline=None)
@given(st.lists(st.integers(0, 383), max_size=40))
def test_the_parts_are_the_whole(tokens: list[int]) -> None:
    """Any tokens: special ones, bytes that are no character, and those the vocabulary lacks."""
    stream = TextStream(TOKENIZER)
    parts = [stream.push(token) for token in tokens]
    whole = "".join(parts) + stream.finish()
    assert whole == TOKENIZER.decode(tokens, skip_special_tokens=True)


def test_half_a_character_is_held_back() -> None:
    stream = TextStream(TOKENIZER)
    first, second = tokens_of("é")
    assert stream.push(first) == ""
    assert stream.push(second) == "é"
    stream = TextStream(TOKENIZER)
    stream.push(first)
    assert stream.finish() == "\ufffd"


@settings(deadline=None)
@given(
    st.text(alphabet="abé", max_size=30),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_it_ends_where_the_first_stop_string_begins(text: str, stop: list[str]) -> None:
    """Beside a search in all of the text after each token, the slow way."""
    stream = TextStream(TOKENIZER, stop)
    given_out, read = "", []
    for token in tokens_of(text):
        read.append(token)
        given_out += stream.push(token)
        so_far = TOKENIZER.decode(read).rstrip("\ufffd")
        assert so_far.startswith(given_out)
        starts = [so_far.find(end) for end in stop if end in so_far]
        if starts:
            assert stream.stopped
            assert given_out + stream.finish() == so_far[: min(starts)]
            return
        assert not stream.stopped
    assert given_out + stream.finish() == text


def test_what_might_begin_a_stop_string_is_held_back() -> None:
    stream = TextStream(TOKENIZER, ["###", "END"])
    parts = [stream.push(token) for token in tokens_of("a#b##E")]
    assert parts == ["a", "", "#b", "", "", "##"]
    assert stream.finish() == "E"


def test_a_stop_string_that_may_not_stop_yet_is_text() -> None:
    stream = TextStream(TOKENIZER, ["ab"])
    parts = [
        stream.push(token, may_stop=index > 2) for index, token in enumerate(tokens_of("abcab"))
    ]
    assert "".join(parts) == "abc"
    assert stream.stopped
