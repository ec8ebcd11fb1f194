"""The loop of every worker: one JSON object a line, requests on stdin, answers on stdout.

A worker first says what it is, or why it cannot start::

    {"ready": true, "name": "llama_cpp", "version": "0.3.36", "settings": {...}}
    {"ready": false, "error": "..."}

Then every request gets one answer, and one that cannot be served gets ``{"error": "..."}``::

    {"op": "decode", "batch": 8, "prompt_tokens": [1, 2], "new_tokens": 64}
    {"op": "prefill", "prompt_tokens": [1, 2]}
    {"op": "exit"}                                          (ends the worker, has no answer)

What a timing covers is the same for all peers. A row's first token comes out of the prefill and is
not counted. ``seconds`` of a decode runs from there to the last token on the host: ``new_tokens``
steps of the whole batch, greedy, with stop tokens ignored, the choice of the token included.
``tokens`` is the number of tokens made in that time, over all rows. ``first_tokens`` is how each
row begins (up to ``NUM_FIRST_TOKENS``, the token of the prefill included), for the caller to gate
the timing on. ``seconds`` of a prefill runs from the token ids to the choice of the first token of
one sequence.

Nothing is warmed up here beyond what the worker's docstring says: discard the first answer at a
new batch size.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

NUM_FIRST_TOKENS = 16


class Decoded(NamedTuple):
    seconds: float
    tokens: int
    first_tokens: list[list[int]]


class Prefilled(NamedTuple):
    seconds: float
    tokens: int


class Engine(Protocol):
    """What a worker serves. Token ids are ints within the vocabulary."""

    name: str
    version: str
    settings: dict[str, Any]

    def decode(self, batch: int, prompt: list[int], new_tokens: int) -> Decoded:
        """Continue ``batch`` copies of the prompt, each in a sequence of its own."""

    def prefill(self, prompt: list[int]) -> Prefilled:
        """Read the prompt once, from an empty cache."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments every worker takes."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--model", type=Path, required=True, help="folder with bf16 safetensors")
    made.add_argument("--work", type=Path, required=True, help="folder for derived files")
    made.add_argument("--threads", type=int, default=2, help="compute threads (2)")
    return made


def serve(start: Callable[[], Engine]) -> int:
    """Answer requests until ``exit`` or the end of stdin; returns the exit status.

    ``start`` imports and builds the engine. What it or its libraries print on stdout, from C too,
    goes to stderr: only answers reach the real stdout. The worker ends within a second or two of
    the process that started it, in the middle of a request too.
    """
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        try:
            engine = start()
        except Exception as error:
            traceback.print_exc()
            _send(answers, {"ready": False, "error": _describe(error)})
            return 1
        _send(
            answers,
            {
                "ready": True,
                "name": engine.name,
                "version": engine.version,
                "settings": engine.settings,
            },
        )
        for line in sys.stdin:
            try:
                request = _parse(line)
                if request["op"] == "exit":
                    break
                answer = _answer(engine, request)
            except Exception as error:
                traceback.print_exc()
                answer = {"error": _describe(error)}
            _send(answers, answer)
    return 0


def _end_with(parent: int) -> None:
    """End this process once it is an orphan: a killed benchmark must not leave cores busy."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    if request["op"] == "prefill":
        return engine.prefill(request["prompt_tokens"])._asdict()
    decoded = engine.decode(request["batch"], request["prompt_tokens"], request["new_tokens"])
    return decoded._asdict()


_FIELDS = {
    "decode": {"op", "batch", "prompt_tokens", "new_tokens"},
    "prefill": {"op", "prompt_tokens"},
    "exit": {"op"},
}


def _parse(line: str) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except ValueError as error:
        raise ValueError(f"a request is a line of JSON: {error}") from None
    if not isinstance(request, dict) or request.get("op") not in _FIELDS:
        raise ValueError(f"a request is an object whose op is one of {sorted(_FIELDS)}")
    expected = _FIELDS[request["op"]]
    if set(request) != expected:
        raise ValueError(f"{request['op']} takes {sorted(expected)}, got {sorted(request)}")
    for field in expected & {"batch", "new_tokens"}:
        if not _is_count(request[field]) or request[field] < 1:
            raise ValueError(f"{field}: expected an integer of at least 1, got {request[field]!r}")
    if "prompt_tokens" in expected:
        prompt = request["prompt_tokens"]
        if not isinstance(prompt, list) or not prompt or not all(map(_is_count, prompt)):
            raise ValueError("prompt_tokens: expected a list of token ids, not empty")
    return request


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _send(stream: IO[str], message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()
