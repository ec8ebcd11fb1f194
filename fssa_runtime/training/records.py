"""JSON lines → records, with errors that name the file, the line and the field."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast


class PreferenceError(ValueError):
    """A line of a preference file is not what it should be; the text says where and why."""


def numbered_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a file of JSON lines, gzip-compressed or not; blank lines are
    skipped. PreferenceError for what is not that, FileNotFoundError for a missing file."""
    number = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _record(line, f"{path}:{number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise PreferenceError(
            f"{path}: expected a complete gzip file, got an error after line {number}: {error}"
        ) from error


def need_fields(record: Mapping[str, Any], fields: Sequence[str], where: str) -> None:
    """PreferenceError unless the record has these fields."""
    for field in fields:
        if field not in record:
            present = ", ".join(sorted(map(repr, record))) or "none"
            raise PreferenceError(f"{where}: field {field!r}: expected, but fields are {present}")


def user_of(record: Mapping[str, Any], where: str) -> str:
    """The field `user`, text or an integer, as text."""
    user = record["user"]
    if isinstance(user, bool) or not isinstance(user, str | int) or user == "":
        raise PreferenceError(
            f"{where}: field 'user': expected non-empty text or an integer, got {describe(user)}"
        )
    return str(user)


def mode_of(record: Mapping[str, Any], where: str) -> str:
    """The optional field `mode`, "" if it is not there."""
    mode = record.get("mode", "")
    if not isinstance(mode, str):
        raise PreferenceError(f"{where}: field 'mode': expected text, got {describe(mode)}")
    return mode


def describe(value: Any) -> str:
    """What a value is, for an error message, without the value itself where it may be long."""
    if value is None:
        return "null"
    if value == "":
        return "empty text"
    if isinstance(value, str) and value.isspace():
        return "white space"
    names = {str: "text", list: "a list", dict: "an object", bool: "a boolean"}
    return names.get(type(value), f"a number ({value})")


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        magic = file.read(2)
    # By content, not by name: downloads often lose or keep a .gz ending wrongly.
    return cast(BinaryIO, gzip.open(path)) if magic == b"\x1f\x8b" else path.open("rb")


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise PreferenceError(f"{where}: expected UTF-8 text, got {error}") from None
    except json.JSONDecodeError as error:
        raise PreferenceError(
            f"{where}: expected one JSON object, got invalid JSON ({error.msg}, "
            f"column {error.colno})"
        ) from None
    except (ValueError, RecursionError) as error:  # what Python does not read, valid or not
        raise PreferenceError(f"{where}: expected one JSON object, got {error}") from None
    if not isinstance(record, dict):
        raise PreferenceError(f"{where}: expected one JSON object, got {describe(record)}")
    return record
