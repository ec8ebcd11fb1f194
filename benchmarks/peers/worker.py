"""The loop of every worker: one JSON object a line, requests on stdin, answers on stdout.

A worker first says what it is, or why it cannot start::

    {"ready": true, "name": "llama_cpp", "version": "0.3.36", "settings": {...}}
    {"ready": false, "error": "..."}

Then every request gets one answer, and one that cannot be served gets ``{"error": "..."}``::

    {"op": "decode", "batch": 8, "prompt_tokens": [1, 2], "new_tokens": 64}
    {"op": "prefill", "prompt_tokens": [1, 2]}
    {"op": "serve", "concurrency": 32, "step_tokens": 512, "requests":
        [{"time": 0.0, "user": 3, "prompt_tokens": [1, 2], "new_tokens": 64}]}    (on one line)
    {"op": "exit"}                                          (ends the worker, has no answer)

What a timing covers is the same for all peers. A row's first token comes out of the prefill and is
not counted. ``seconds`` of a decode runs from there to the last token on the host: ``new_tokens``
steps of the whole batch, greedy, with stop tokens ignored, the choice of the token included.
``tokens`` is the number of tokens made in that time, over all rows. ``first_tokens`` is how each
row begins (up to ``NUM_FIRST_TOKENS``, the token of the prefill included), for the caller to gate
the timing on. ``seconds`` of a prefill runs from the token ids to the choice of the first token of
one sequence.

To serve is to batch continuously: at most ``concurrency`` answers in flight, each joining when it
has arrived and there is room, and at most ``step_tokens`` tokens in a step, so that a long prompt
is read in pieces beside what is being written. ``play`` says what comes back. Requests are in order
of time. A peer that has adapters gives each user one of their own, as far as ``lora.numbers`` goes,
and has them in memory before the clock starts.

Nothing is warmed up here beyond what the worker's docstring says: discard the first answer at a
new batch size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, runtime_checkable

from benchmarks.peers.play import NUM_FIRST_TOKENS as NUM_FIRST_TOKENS
from benchmarks.peers.play import Ask, Played


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


@runtime_checkable
class Server(Engine, Protocol):
    """An engine that batches continuously."""

    def serve(self, asked: list[Ask], concurrency: int, step_tokens: int) -> Played:
        """Answer requests as they come, in order of time."""


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
    if request["op"] == "serve":
        if not isinstance(engine, Server):
            raise TypeError(f"{engine.name} does not batch continuously")
        asked = [Ask(**one) for one in request["requests"]]
        return engine.serve(asked, request["concurrency"], request["step_tokens"])._asdict()
    decoded = engine.decode(request["batch"], request["prompt_tokens"], request["new_tokens"])
    return decoded._asdict()


_FIELDS = {
    "decode": {"op", "batch", "prompt_tokens", "new_tokens"},
    "prefill": {"op", "prompt_tokens"},
    "serve": {"op", "requests", "concurrency", "step_tokens"},
    "exit": {"op"},
}


def _parse(line: str) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except ValueError as error:
        raise ValueError(f"a request is a line of JSON: {error}") from None
    if not isinstance(request, dict) or request.get("op") not in _FIELDS:
        raise ValueError(f"a request is an object whose op is one of {sorted(_FIELDS)}")
    _check(request["op"], request, _FIELDS[request["op"]])
    if request["op"] == "serve":
        _check_requests(request["requests"])
    return request


def _check(what: str, fields: dict[str, Any], expected: set[str]) -> None:
    """Raise ``ValueError`` unless there are these fields and counts and prompts are such."""
    if set(fields) != expected:
        raise ValueError(f"{what} takes {sorted(expected)}, got {sorted(fields)}")
    for field in expected & {"batch", "new_tokens", "concurrency", "step_tokens"}:
        if not _is_count(fields[field]) or fields[field] < 1:
            raise ValueError(f"{field}: expected an integer of at least 1, got {fields[field]!r}")
    if "prompt_tokens" in expected:
        prompt = fields["prompt_tokens"]
        if not isinstance(prompt, list) or not prompt or not all(map(_is_count, prompt)):
            raise ValueError("prompt_tokens: expected a list of token ids, not empty")


def _check_requests(requests: Any) -> None:
    if not isinstance(requests, list) or not requests:
        raise ValueError("requests: expected a list of objects, not empty")
    before = 0.0
    for one in requests:
        if not isinstance(one, dict):
            raise ValueError(f"requests: expected objects, got {one!r}")
        _check("a request", one, set(Ask._fields))
        if not _is_count(one["user"]):
            raise ValueError(f"user: expected a number of at least 0, got {one['user']!r}")
        if not isinstance(one["time"], (int, float)) or not before <= one["time"] < math.inf:
            raise ValueError(f"time: expected seconds from {before:g} on, got {one['time']!r}")
        before = one["time"]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _send(stream: IO[str], message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()
