"""A replay that another thread or a signal comes into."""

import signal
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from fssa_kernels.native import MISSING, NATIVE
from tests.kernels.chain import STEPS, Chain, bits, check_replay_is_eager

pytestmark = [
    pytest.mark.skipif(NATIVE is None, reason=str(MISSING)),
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers"),
]


@contextmanager
def called_at_a_signal(handler):
    """After a while of processor time: the tests' own timeout has the timer of the other kind."""
    before = signal.signal(signal.SIGVTALRM, lambda *_: handler())
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.02)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


# Long after a signal's moment even where a busy machine made the first replays look slow.
LONG = 4.0


def repeats_of(graph, rows, seconds=LONG):
    """How often the graph must be replayed to be busy for so long, about, or longer on a busy
    machine: by the best of several tries."""
    return 1 + int(seconds / min(sum(graph.profile(10, **rows)) for _ in range(10)))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_what_a_signal_s_handler_raises_ends_a_replay(num_threads):
    torch.set_num_threads(num_threads)
    chain = Chain()
    graph = chain.record()
    rows = chain.fill(STEPS["all"])
    repeats = repeats_of(graph, rows, 20)

    def stop():
        raise KeyboardInterrupt

    for _ in range(3):
        start = time.thread_time()  # not that of others who want the cores as well
        with pytest.raises(KeyboardInterrupt), called_at_a_signal(stop):
            graph.profile(repeats, **rows)
        assert time.thread_time() - start < 5
    check_replay_is_eager(chain, graph, STEPS["all"])


def test_a_replay_goes_on_after_a_handler_that_raises_nothing():
    chain = Chain()
    graph = chain.record()
    rows = chain.fill(STEPS["all"])
    repeats = repeats_of(graph, rows)
    seen = []
    with called_at_a_signal(lambda: seen.append(time.perf_counter())):
        seconds = graph.profile(repeats, **rows)
        end = time.perf_counter()
    assert len(seen) == 1
    assert end - seen[0] > 0.1
    assert sum(seconds) * repeats > 0.2  # all of it


def test_only_the_main_thread_looks_for_signals():
    """Another thread would wait for the GIL in the middle of a replay, and could do nothing."""
    chain = Chain()
    graph = chain.record()
    rows = chain.fill(STEPS["all"])
    asked = []

    class Native:
        def replay(self, dims, num_threads, is_main):
            asked.append(is_main)

    graph._native = Native()
    graph.replay(**rows)
    thread = threading.Thread(target=lambda: graph.replay(**rows))
    thread.start()
    thread.join()
    assert asked == [True, False]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_second_thread_is_refused_and_disturbs_nothing(num_threads):
    torch.set_num_threads(num_threads)
    chain = Chain()
    graph = chain.record()
    rows = chain.fill(STEPS["all"])
    graph.replay(**rows)
    expected = [tensor.clone() for tensor in graph.outputs]
    repeats = repeats_of(graph, rows)
    refused = []

    def replay_too():
        for call in (graph.replay, lambda **rows: graph.profile(1, **rows)):
            try:
                call(tokens=1, sequences=1)
            except RuntimeError as error:
                refused.append(str(error))

    def in_another_thread():
        thread = threading.Thread(target=replay_too)
        thread.start()
        thread.join()

    with called_at_a_signal(in_another_thread):
        graph.profile(repeats, **rows)
    assert refused == ["replay: expected one thread at a time, got a graph that runs"] * 2
    for got, right in zip(graph.outputs, expected, strict=True):
        assert torch.equal(bits(got), bits(right))
    check_replay_is_eager(chain, graph, STEPS["all"])
