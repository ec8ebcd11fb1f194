"""Requests that arrive over time, played to any engine by one loop. Standard library only.

Ours and the peers' workers play a trace with `play`, so that a time to a token means the same on
every side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

NUM_FIRST_TOKENS = 16


class Ask(NamedTuple):
    """A request: when it arrives, in seconds from the start; whose; what; how much is written.

    Stop tokens are ignored and the choice is greedy: there are ``new_tokens`` tokens.
    """

    time: float
    user: int
    prompt_tokens: list[int]
    new_tokens: int


class Played(NamedTuple):
    """What came of a trace, request by request.

    seconds: from the start to the last token. times: when each token was on the host, in seconds
    from the start. first_tokens: how each answer begins, up to ``NUM_FIRST_TOKENS``.
    """

    seconds: float
    times: list[list[float]]
    first_tokens: list[list[int]]


def play(
    asked: Sequence[Ask],
    add: Callable[[int], None],
    step: Callable[[], Iterable[tuple[int, int]]],
) -> Played:
    """Play requests, in order of time, until all are answered.

    add: queue request i of ``asked``. step: compute one step of what is queued; (request, token)
    for every token it made. A step may make none.

    Raises ``RuntimeError`` where an answer gets more tokens than were asked for.
    """
    times: list[list[float]] = [[] for _ in asked]
    first: list[list[int]] = [[] for _ in asked]
    arrived = in_flight = 0
    start = time.perf_counter()
    while arrived < len(asked) or in_flight:
        now = time.perf_counter() - start
        while arrived < len(asked) and asked[arrived].time <= now:
            add(arrived)
            arrived += 1
            in_flight += 1
        if not in_flight:
            time.sleep(asked[arrived].time - now)
            continue
        made = step()
        now = time.perf_counter() - start
        for index, token in made:
            times[index].append(now)
            if len(first[index]) < NUM_FIRST_TOKENS:
                first[index].append(token)
            wanted = asked[index].new_tokens
            if len(times[index]) > wanted:
                raise RuntimeError(f"request {index}: more than the {wanted} tokens asked for")
            in_flight -= len(times[index]) == wanted
    return Played(time.perf_counter() - start, times, first)
