"""Text as it comes: never what a later token would have changed, and ended by the first stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from fssa_runtime.engine.text import Detokenizer, TextStream

from .models import byte_tokenizer


def sentencepiece_tokenizer() -> Any:
    """Pieces with a mark for a space, bytes for the rest, the first space left out: as Llama 2."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "é", "▁a", "ab", "▁abé", "▁▁"]
    made = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<s>", "</s>"])
    made.add_tokens(["<tool> é"])
    return made


def byte_level_tokenizer() -> Any:
    """As the test models', and tokens that were added to the vocabulary, as they are."""
    made = byte_tokenizer().backend_tokenizer
    made.add_tokens(["<tool> é", "plain"])
    return made


TOKENIZERS = {"bytes": byte_level_tokenizer(), "pieces": sentencepiece_tokenizer()}
TOKENIZER = TOKENIZERS["bytes"]


def tokens_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def stream_of(stop: Sequence[str] = (), kind: str = "bytes") -> TextStream:
    return Detokenizer(TOKENIZERS[kind]).stream(stop)


@settings(deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() + 3), max_size=40))
def test_the_parts_are_the_whole(tokens: list[int]) -> None:
    """Any tokens: special and added ones, bytes that are no character, and unknown ones."""
    stream = stream_of()
    whole = "".join(map(stream.push, tokens)) + stream.finish()
    assert whole == TOKENIZER.decode(tokens, skip_special_tokens=True)


@settings(deadline=None)
@given(st.lists(st.sampled_from([*"aé€\n", 1, 2, *range(259, 268)]), max_size=40))
def test_the_parts_are_the_whole_of_pieces(parts: list[int | str]) -> None:
    """Where bytes are characters: of others the tokenizer changes its mind later."""
    tokens: list[int] = []
    for part in parts:
        tokens += [part] if isinstance(part, int) else [3 + byte for byte in part.encode()]
    stream = stream_of(kind="pieces")
    whole = "".join(map(stream.push, tokens)) + stream.finish()
    assert whole == TOKENIZERS["pieces"].decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_token_alone(kind: str) -> None:
    for token in range(TOKENIZERS[kind].get_vocab_size()):
        stream = stream_of(kind=kind)
        whole = TOKENIZERS[kind].decode([token], skip_special_tokens=True)
        assert stream.push(token) + stream.finish() == whole


def test_half_a_character_is_held_back() -> None:
    stream = stream_of()
    first, second = tokens_of("é")
    assert stream.push(first) == ""
    assert stream.push(second) == "é"
    stream = stream_of()
    stream.push(first)
    assert stream.finish() == "\ufffd"


@settings(deadline=None)
@given(
    st.text(alphabet="abé", max_size=30),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_it_ends_where_the_first_stop_string_begins(text: str, stop: list[str]) -> None:
    """Beside a search in all of the text after each token, the slow way."""
    stream = stream_of(stop)
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
    stream = stream_of(["###", "END"])
    parts = [stream.push(token) for token in tokens_of("a#b##E")]
    assert parts == ["a", "", "#b", "", "", "##"]
    assert stream.finish() == "E"


def test_a_stop_string_that_may_not_stop_yet_is_text() -> None:
    stream = stream_of(["ab"])
    parts = [
        stream.push(token, may_stop=index > 2) for index, token in enumerate(tokens_of("abcab"))
    ]
    assert "".join(parts) == "abc"
    assert stream.stopped
