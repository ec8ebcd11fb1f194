"""Work spread over processes, each with a GPU context of its own.

A kernel that reads where it must not takes its process's context with it: whatever is left goes to
a fresh one. With no workers the work is done here, one piece after the other.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from benchmarks.gpu_suite.suite import OUT_OF_TIME, reason
from benchmarks.gpu_suite.timing import Deadline


def spread(
    work: Callable[[Any], Any], pieces: Sequence[Any], workers: int, deadline: Deadline
) -> Iterator[tuple[int, Any, str]]:
    """(index, result, "") of every piece as it is done, (index, None, why not) of the others."""
    if not workers:
        for index, piece in enumerate(pieces):
            if deadline.passed:
                yield index, None, OUT_OF_TIME
            else:
                yield index, *_attempt(work, piece)
        return
    waiting = [list(range(start, len(pieces), workers)) for start in range(workers)]
    waiting = [indices for indices in waiting if indices]
    running: dict[Connection, tuple[Any, list[int]]] = {}
    context = multiprocessing.get_context("spawn")
    try:
        while (waiting or running) and not deadline.passed:
            while waiting and len(running) < workers:
                indices = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                arguments = (work, [(i, pieces[i]) for i in indices], sender)
                process = context.Process(target=_worker, args=arguments, daemon=True)
                process.start()
                sender.close()
                running[receiver] = process, indices
            for connection in wait(list(running), timeout=min(1.0, deadline.left)):
                process, indices = running[connection]
                try:
                    index, result, why = connection.recv()
                except EOFError:
                    process.join()
                    del running[connection]
                    if indices and process.exitcode != 0:
                        index = indices.pop(0)
                        yield index, None, f"error: the process ended with {process.exitcode}"
                    if indices:
                        waiting.append(indices)
                    continue
                indices.remove(index)
                yield index, result, why
    finally:
        for process, _ in running.values():
            process.kill()
    for indices in [*waiting, *(indices for _, indices in running.values())]:
        for index in indices:
            yield index, None, OUT_OF_TIME


def _worker(work: Callable[[Any], Any], pieces: list[tuple[int, Any]], sender: Connection) -> None:
    for index, piece in pieces:
        result, why = _attempt(work, piece)
        sender.send((index, result, why))
        if "CUDA error" in why or "AcceleratorError" in why:
            return  # nothing works in this process any more


def _attempt(work: Callable[[Any], Any], piece: Any) -> tuple[Any, str]:
    try:
        return work(piece), ""
    except Exception as error:
        return None, reason(error)
