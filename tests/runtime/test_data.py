"""Preference files: what is read, what is refused and how, and what a split separates."""

import gzip
import json

import numpy as np
import pytest

from fssa_runtime.training.data import (
    Message,
    Preference,
    PreferenceData,
    PreferenceError,
    as_messages,
    iter_preferences,
    read_preferences,
    split_preferences,
)

TEXT = {"user": "u1", "prompt": "Hello?", "chosen": "Hi.", "rejected": "No."}
CHAT = {
    "user": 7,
    "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}],
    "chosen": [{"role": "assistant", "content": "Hi."}],
    "rejected": [{"role": "assistant", "content": "No."}],
    "score": 3,
}


def write(path, *records):
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_text_and_chat_are_read(tmp_path):
    path = write(tmp_path / "p.jsonl", TEXT, b"", {**CHAT, "mode": "kind"})
    first, second = iter_preferences(path)
    assert first == Preference("u1", "Hello?", "Hi.", "No.")
    assert second.user == "7"
    assert second.mode == "kind"
    assert second.prompt == (Message("system", "Be kind."), Message("user", "Hello?"))
    assert as_messages(first.prompt, first.chosen) == [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Hi."},
    ]
    assert as_messages(second.prompt, second.rejected) == [
        *CHAT["prompt"],
        {"role": "assistant", "content": "No."},
    ]


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.jsonl"])
def test_gzip_is_recognised_by_content(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(json.dumps(TEXT).encode() + b"\n"))
    assert [p.user for p in iter_preferences(path)] == ["u1"]


def test_a_byte_order_mark_is_not_data(tmp_path):
    path = write(tmp_path / "p.jsonl", b"\xef\xbb\xbf" + json.dumps(TEXT).encode())
    assert len(read_preferences(path)) == 1


def test_reading_streams(tmp_path):
    path = write(tmp_path / "p.jsonl", TEXT, b"not json")
    lines = iter_preferences(path)
    assert next(lines).user == "u1"
    with pytest.raises(PreferenceError):
        next(lines)


def without(record, field):
    return {k: v for k, v in record.items() if k != field}


BAD_LINES = [
    (b"{", "expected one JSON object, got invalid JSON"),
    (b'{"user": ' + 5000 * b"9" + b"}", "expected one JSON object, got Exceeds the limit"),
    (100_000 * b"[", "expected one JSON object, got .*recursion"),
    (b"[1]", "expected one JSON object, got a list"),
    (b'{"user": "\xff"}', "expected UTF-8 text"),
    (without(TEXT, "user"), "field 'user': expected, but fields are 'chosen', 'prompt'"),
    (without(TEXT, "chosen"), "field 'chosen': expected, but fields are"),
    ({**TEXT, "user": ""}, "field 'user': expected non-empty text or an integer, got empty text"),
    ({**TEXT, "user": True}, "field 'user': .* got a boolean"),
    ({**TEXT, "mode": 3}, r"field 'mode': expected text, got a number \(3\)"),
    ({**TEXT, "prompt": None}, "field 'prompt': expected text or a list of messages, got null"),
    ({**TEXT, "chosen": 1.5}, r"field 'chosen': expected text or a list.* got a number \(1.5\)"),
    ({**TEXT, "chosen": CHAT["chosen"]}, "field 'chosen': expected text like 'prompt', got a list"),
    ({**CHAT, "rejected": "No."}, "field 'rejected': expected a list like 'prompt', got text"),
    ({**CHAT, "chosen": []}, "field 'chosen': expected at least one message, got an empty list"),
    ({**CHAT, "chosen": ["Hi."]}, "field 'chosen': message 0: expected an object"),
    (
        {**CHAT, "chosen": [{"role": "bot", "content": "Hi."}]},
        "field 'chosen': message 0: field 'role': expected one of .*, got 'bot'",
    ),
    (
        {**CHAT, "prompt": [*CHAT["prompt"], {"role": "user"}]},
        "field 'prompt': message 2: field 'content': expected text, got null",
    ),
    ({**TEXT, "prompt": ""}, "field 'prompt': expected words, got empty text"),
    ({**TEXT, "rejected": ["No.", " \n"]}, "'rejected': answer 1: expected words, got white space"),
    (
        {**CHAT, "chosen": [{"role": "assistant", "content": "\t"}]},
        "field 'chosen': message 0: field 'content': expected words, got white space",
    ),
    ({**TEXT, "rejected": "Hi."}, "expected two different answers"),
    ({**TEXT, "rejected": []}, "field 'rejected': expected at least one answer, got none"),
    ({**TEXT, "rejected": ["No.", "Hi."]}, "expected two different answers"),
    ({**TEXT, "rejected": ["No.", "No."]}, "field 'rejected': expected different answers"),
    ({**TEXT, "rejected": [CHAT["rejected"]]}, "field 'rejected': expected text like 'prompt'"),
    ({**CHAT, "rejected": [CHAT["rejected"], []]}, "'rejected': answer 1: expected at least one"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "p.jsonl", TEXT, line, TEXT)
    with pytest.raises(PreferenceError, match=message) as caught:
        read_preferences(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_choices_among_several_are_read_where_they_can_be_used(tmp_path):
    dull = [{"role": "assistant", "content": "Hm."}]
    path = write(
        tmp_path / "p.jsonl",
        {**TEXT, "rejected": ["No.", "Go away."]},
        {**CHAT, "rejected": [CHAT["rejected"][0:1], dull]},
        {**TEXT, "rejected": ["No."]},
    )
    text, chat, pair = read_preferences(path).preferences
    assert text.all_rejected == ("No.", "Go away.")
    no = (Message("assistant", "No."),)
    assert (chat.rejected, chat.also_rejected) == (no, ((Message("assistant", "Hm."),),))
    assert pair == Preference("u1", "Hello?", "Hi.", "No.")
    with pytest.raises(PreferenceError, match=r"p.jsonl:1: .* only pairs can be used here, got 2"):
        read_preferences(path, pairs_only=True)


def cut_off(packed):
    return packed[:-12]


def flip_checksum(packed):
    return packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:]


def flip_first_block(packed):
    """The kind of the first compressed block, behind ten bytes of header, is one there is not."""
    return packed[:10] + bytes([packed[10] | 0b110]) + packed[11:]


@pytest.mark.parametrize("damage", [cut_off, flip_checksum, flip_first_block])
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(damage(gzip.compress((json.dumps(TEXT) + "\n").encode() * 50)))
    with pytest.raises(PreferenceError, match=r"p\.jsonl\.gz: expected a complete gzip file"):
        read_preferences(path)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_preferences(tmp_path / "absent.jsonl")
    with pytest.raises(PreferenceError, match="at least one preference, got none"):
        read_preferences(write(tmp_path / "empty.jsonl"))


def test_a_user_has_one_mode_over_all_files(tmp_path):
    first = write(tmp_path / "a.jsonl", {**TEXT, "mode": "x"})
    second = write(tmp_path / "b.jsonl", {**TEXT, "mode": "y"})
    with pytest.raises(PreferenceError, match=r"b.jsonl:1: field 'mode': expected 'x' for user"):
        read_preferences([first, second])


def make_data(num_users=20, num_prompts=30):
    """One user in ten is of the rare mode b."""
    return PreferenceData(
        tuple(
            Preference(f"u{u}", f"p{p}", f"good {u}", f"bad {p}", mode="ab"[u % 10 == 1])
            for u in range(num_users)
            for p in range(num_prompts)
        )
    )


def test_grouping():
    data = make_data(3, 4)
    assert list(data.rows_by_user) == ["u0", "u1", "u2"]
    assert data.rows_by_user["u1"].tolist() == [4, 5, 6, 7]
    assert data.prompt_ids.tolist() == [0, 1, 2, 3] * 3
    assert data.mode_of_user == {"u0": "a", "u1": "b", "u2": "a"}


def test_split_shares_neither_prompt_nor_user():
    data = make_data()
    split = split_preferences(data, heldout_users=0.2, heldout_prompts=0.3, seed=1)

    def users_and_prompts(rows):
        chosen = [data.preferences[row] for row in rows]
        return {p.user for p in chosen}, {p.prompt for p in chosen}

    train_users, train_prompts = users_and_prompts(split.train)
    new_users, new_prompts = users_and_prompts(split.heldout)
    assert not train_users & new_users
    assert not train_prompts & new_prompts
    # A fifth of 18 users and of 2, rounded up.
    assert [data.mode_of_user[user] for user in sorted(new_users)].count("b") == 1
    assert (len(new_users), len(new_prompts)) == (5, 9)
    assert users_and_prompts(split.known_users_new_prompts) == (train_users, new_prompts)
    assert users_and_prompts(split.new_users_known_prompts) == (new_users, train_prompts)
    parts = [
        split.train,
        split.heldout,
        split.known_users_new_prompts,
        split.new_users_known_prompts,
    ]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(data)))


def test_split_depends_on_the_seed_and_not_on_line_order():
    data = make_data()
    reverse = PreferenceData(data.preferences[::-1])

    def heldout(data, seed):
        split = split_preferences(data, heldout_users=0.2, heldout_prompts=0.2, seed=seed)
        return {data.preferences[row] for row in split.heldout}

    assert heldout(data, 0) == heldout(reverse, 0)
    assert heldout(data, 0) != heldout(data, 1)


def test_impossible_splits_are_refused():
    with pytest.raises(ValueError, match="heldout_users: expected a share"):
        split_preferences(make_data(), heldout_users=1.0, heldout_prompts=0.2, seed=0)
    with pytest.raises(ValueError, match="train: expected at least one preference"):
        split_preferences(make_data(2, 1), heldout_users=0.2, heldout_prompts=0.2, seed=0)
