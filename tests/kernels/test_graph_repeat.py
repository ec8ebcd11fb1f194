"""Steps that follow one another in one call: to the bit what one replay after another gives."""

import threading
import time

import pytest
import torch

from fssa_kernels import Following, StepGraph, advance_step
from fssa_kernels.native import MISSING, NATIVE
from tests.kernels.chain import MAX_PAGES, PAGE, SEQUENCES, Chain, bits
from tests.kernels.test_graph_interrupted import called_at_a_signal

pytestmark = pytest.mark.skipif(NATIVE is None, reason=str(MISSING))

STEPS = 7
REQUESTS = [(1, 5, 1), (1, 3, 2), (1, 8, 0)]  # one new token each
ROWS = dict(tokens=3, sequences=3)


class Repeated:
    """A chain whose step is recorded with what follows it."""

    def __init__(self, dtype=torch.bfloat16, max_steps=STEPS):
        self.chain = chain = Chain(dtype)
        self.log_tokens = torch.full((SEQUENCES, max_steps), -77, dtype=torch.int32)
        self.log_logprobs = torch.full((SEQUENCES, max_steps), -77.0)
        self.interrupt = torch.zeros(1, dtype=torch.int32)
        chain.sequences |= {
            "draws": torch.rand(SEQUENCES, max_steps, generator=chain.g),
            "stops": torch.full((SEQUENCES, 2), -1, dtype=torch.int32),
            "num_done": torch.zeros(SEQUENCES, dtype=torch.int32),
            "ended": torch.zeros(SEQUENCES, dtype=torch.int32),
        }
        self.graph = StepGraph.record(
            lambda _: chain.step(),
            chain.inputs,
            Following(self.advance, chain.sequences["ended"], self.interrupt),
        )

    def advance(self, outputs, rows=None, **options):
        t, s = self.chain.tokens, self.chain.sequences
        whole = [
            *(t[name] for name in ("ids", "positions", "kv_slots")),
            *(s[name] for name in ("kv_lens", "tables", "uniform", "draws", "stops", "num_done")),
            self.log_tokens,
            self.log_logprobs,
            s["ended"],
        ]
        parts = [tensor[:rows] for tensor in (*outputs[-2:], *whole)]
        advance_step(*parts, page_size=PAGE, **options)

    def fill(self):
        self.chain.fill(REQUESTS)
        s = self.chain.sequences
        s["uniform"][:] = s["draws"][:, 0]
        s["num_done"].zero_()
        s["ended"].zero_()

    def state(self):
        """All that steps write, but for outputs past the rows in use."""
        written = [*self.chain.tokens.values(), *self.chain.sequences.values()]
        written += [self.log_tokens, self.log_logprobs, *self.chain.caches]
        written += [output[:3] for output in self.graph.outputs]
        return [bits(tensor.clone()) for tensor in written]


def replayed(dtype, times):
    """The same, one replay after another, with the reference of `advance_step` between them."""
    one = Repeated(dtype)
    one.fill()
    for _ in range(times):
        one.graph.replay(**ROWS)
        one.advance(one.graph.outputs, rows=3, backend="reference")
    return one


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("times", [1, 2, STEPS])
def test_it_is_bitwise_one_replay_after_another(dtype, times, num_threads):
    torch.set_num_threads(num_threads)
    one = Repeated(dtype)
    for _ in range(2):
        one.fill()
        for cache in one.chain.caches:
            cache.zero_()
        assert one.graph.repeat(ROWS, times) == times
        expected = replayed(dtype, times).state()
        assert all(torch.equal(a, b) for a, b in zip(one.state(), expected, strict=True))
    assert len(one.log_tokens[:3, :times].unique()) > 1
    assert (one.log_tokens[3:] == -77).all()


def test_a_replay_knows_nothing_of_what_follows():
    one = Repeated()
    one.fill()
    before = [t.clone() for t in (*one.chain.tokens.values(), *one.chain.sequences.values())]
    one.graph.replay(**ROWS)
    seconds = one.graph.profile(2, **ROWS)
    after = [*one.chain.tokens.values(), *one.chain.sequences.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert len(one.graph) == len(one.graph.names) == len(seconds)
    assert one.graph.names[-1] == "sample"


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("row", [0, 2])
def test_it_ends_with_the_step_that_ends_a_row(row, num_threads):
    """Whichever thread has the row: the one that looks waits for the others."""
    torch.set_num_threads(num_threads)
    whole = replayed(torch.bfloat16, STEPS)
    tokens = whole.log_tokens[row].tolist()
    step = next(i for i in range(2, STEPS) if tokens[i] not in tokens[:i])
    one = Repeated()
    one.chain.sequences["stops"][row, 1] = tokens[step]
    for _ in range(100):
        one.fill()
        assert one.graph.repeat(ROWS, STEPS) == step + 1
    assert one.chain.sequences["ended"][:3].tolist() == [int(b == row) for b in range(3)]
    assert torch.equal(one.log_tokens[:3, : step + 1], whole.log_tokens[:3, : step + 1])
    assert (one.log_tokens[:, step + 1 :] == -77).all()


def test_rows_that_are_not_in_use_end_nothing():
    one = Repeated()
    one.fill()
    one.chain.sequences["ended"][3] = 1
    assert one.graph.repeat(ROWS, STEPS) == STEPS


def test_an_interrupt_ends_it_after_the_step_at_hand():
    one = Repeated(max_steps=5000)
    one.interrupt[0] = 1
    one.fill()
    assert one.graph.repeat(ROWS, STEPS) == 1
    assert one.interrupt[0] == 1
    one.interrupt[0] = 0
    one.fill()
    assert one.graph.repeat(ROWS, STEPS) == STEPS


def test_an_interrupt_may_come_from_any_thread(monkeypatch):
    one = Repeated()
    one.fill()
    # Never full and never at the last step: rows go on where they stand.
    monkeypatch.setattr(one, "advance", lambda _: None)
    graph = StepGraph.record(
        lambda _: one.chain.step(),
        one.chain.inputs,
        Following(one.advance, one.chain.sequences["ended"], one.interrupt),
    )
    timer = threading.Timer(0.2, lambda: one.interrupt.fill_(1))
    timer.start()
    start = time.perf_counter()
    done = graph.repeat(ROWS, 10**9)
    timer.join()
    assert 1 < done < 10**9
    assert 0.1 < time.perf_counter() - start < 30


def test_no_step_begins_that_would_end_too_late():
    one = Repeated()
    for seconds, expected in ((0.0, 1), (-1.0, 1), (1000.0, STEPS)):
        one.fill()
        assert one.graph.repeat(ROWS, STEPS, seconds) == expected


@pytest.mark.parametrize("num_threads", [1, 2])
def test_indices_are_checked_before_every_step(num_threads):
    """What the steps before wrote stays, and the graph can be used again."""
    torch.set_num_threads(num_threads)
    one = Repeated()
    one.fill()
    # The second request has three tokens: its second page is needed for the fifth.
    one.chain.sequences["tables"][1, 1] = SEQUENCES * MAX_PAGES
    with pytest.raises(ValueError, match=r"(kv_slots|block_tables): expected values in"):
        one.graph.repeat(ROWS, STEPS)
    assert one.chain.sequences["num_done"][:3].tolist() == [2, 2, 2]
    one.fill()
    assert one.graph.repeat(ROWS, STEPS) == STEPS


def test_bad_indices_at_the_start_are_an_error_before_anything_is_written():
    one = Repeated()
    one.fill()
    one.chain.tokens["slots"][1] = 99
    before = one.state()
    with pytest.raises(ValueError, match="slots: expected values in"):
        one.graph.repeat(ROWS, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(one.state(), before, strict=True))


def test_a_signal_ends_it():
    one = Repeated()
    one.fill()
    graph = StepGraph.record(
        lambda _: one.chain.step(),
        one.chain.inputs,
        Following(lambda _: None, one.chain.sequences["ended"], one.interrupt),
    )

    def stop():
        raise KeyboardInterrupt

    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt), called_at_a_signal(stop):
        graph.repeat(ROWS, 10**9)
    assert time.perf_counter() - start < 30
    assert graph.repeat(ROWS, 3) == 3


@pytest.mark.parametrize(
    ("rows", "times", "message"),
    [
        (ROWS, 0, "times: expected at least 1, got 0"),
        (dict(tokens=3), 2, "expected rows of tokens, sequences"),
        (dict(tokens=99, sequences=3), 2, "tokens: expected 0 to 9 rows, got 99"),
    ],
)
def test_bad_input(rows, times, message):
    one = Repeated()
    one.fill()
    before = one.state()
    with pytest.raises(ValueError, match=f"StepGraph: {message}"):
        one.graph.repeat(rows, times)
    assert all(torch.equal(a, b) for a, b in zip(one.state(), before, strict=True))


def test_a_graph_that_does_not_know_what_follows_runs_once():
    chain = Chain()
    graph = chain.record()
    rows = chain.fill(REQUESTS)
    assert not graph.can_repeat
    assert graph.repeat(rows, 1) == 1
    with pytest.raises(ValueError, match="times: expected 1: nothing says what follows"):
        graph.repeat(rows, 2)


@pytest.mark.parametrize(
    ("ended", "interrupt", "message"),
    [
        (torch.zeros(SEQUENCES, dtype=torch.int32), None, "ended: expected a static input"),
        ("temperature", None, "ended: expected a static input, one int32 number a row"),
        ("tables", None, "ended: expected a static input, one int32 number a row"),
        (None, torch.zeros(1), "interrupt: expected one int32 number, got torch.float32"),
        (None, torch.zeros(2, dtype=torch.int32), "interrupt: expected one int32 number"),
    ],
)
def test_what_ends_it_must_be_where_it_can_be_read(ended, interrupt, message):
    one = Repeated()
    if ended is None:
        ended = one.chain.sequences["ended"]
    elif isinstance(ended, str):
        ended = one.chain.sequences[ended]
    following = Following(one.advance, ended, one.interrupt if interrupt is None else interrupt)
    with pytest.raises(ValueError, match=f"StepGraph: {message}"):
        StepGraph.record(lambda _: one.chain.step(), one.chain.inputs, following)
