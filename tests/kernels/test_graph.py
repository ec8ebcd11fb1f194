"""StepGraph: a replay is the eager step, to the bit, and only what was asked for is written."""

import itertools
import sys
import threading
import time

import pytest
import torch

from fssa_kernels import (
    StepGraph,
    graph_native,
    modulated_linear,
    pack_matrix,
    residual_film_rms_norm,
)
from fssa_kernels.native import MISSING, NATIVE
from tests.kernels.chain import (
    DTYPES,
    POSITIONS,
    SEQUENCES,
    STEPS,
    TOKENS,
    USERS,
    VOCAB,
    Chain,
    PoolWithoutReuse,
    bits,
    check_replay_is_eager,
    is_poisoned,
    poison,
)

pytestmark = pytest.mark.skipif(NATIVE is None, reason=str(MISSING))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own_memory", [False, True])
def test_replay_is_bitwise_the_eager_step_and_writes_nothing_past_its_rows(
    dtype, num_threads, own_memory, monkeypatch
):
    """One recording serves every number of rows, user, length and page."""
    if own_memory:
        monkeypatch.setattr(graph_native, "_Pool", PoolWithoutReuse)
    torch.set_num_threads(num_threads)
    chain = Chain(dtype)
    graph = chain.record()
    assert len(graph) == len(graph.names)
    assert graph.names.count("paged_attention") == 2
    assert graph.names[-1] == "sample"
    for requests in [*STEPS.values(), STEPS["prefill"]]:
        check_replay_is_eager(chain, graph, requests, own_memory)


@pytest.mark.parametrize("name", NATIVE.instruction_sets() if NATIVE else [])
def test_replay_is_bitwise_eager_on_every_instruction_set(name):
    before = NATIVE.instruction_set()
    NATIVE.set_instruction_set(name)
    try:
        chain = Chain()
        check_replay_is_eager(chain, chain.record(), STEPS["all"])
    finally:
        NATIVE.set_instruction_set(before)


def test_recording_computes_nothing():
    chain = Chain()
    chain.fill(STEPS["all"])
    poison(chain.caches)
    chain.record()
    assert all(is_poisoned(cache) for cache in chain.caches)


def test_static_inputs_are_read_at_replay():
    chain = Chain()
    graph = chain.record()
    rows = chain.fill([(1, 5, 0), (1, 7, 2)])
    logits = []
    changes = [
        lambda: None,
        lambda: chain.tokens["slots"].fill_(1),
        lambda: chain.tokens["ids"][0].add_(1),
        lambda: chain.sequences["kv_lens"].add_(1),
        lambda: chain.sequences["tables"][:, 0].add_(1),
        lambda: chain.tokens["positions"].add_(1),
        lambda: chain.layers[0]["qkv"]["rows"][1].mul_(3),  # the user changed their mind
    ]
    for change in changes:
        change()
        for cache in chain.caches:
            cache.copy_(torch.linspace(-1, 1, cache.numel()).view(cache.shape))
        graph.replay(**rows)
        logits.append(graph.outputs[-3][:2].clone())
    for i, before in enumerate(logits[:-1]):
        for after in logits[i + 1 :]:
            assert not torch.equal(before, after)


def test_profile_times_every_op():
    chain = Chain()
    graph = chain.record()
    rows = chain.fill(STEPS["all"])
    graph.replay(**rows)
    expected = [t.clone() for t in graph.outputs]
    seconds = graph.profile(3, **rows)
    assert len(seconds) == len(graph)
    assert all(0 < s < 10 for s in seconds)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(graph.outputs, expected, strict=True))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (dict(tokens=1), "expected rows of tokens, sequences, got tokens"),
        (dict(), "expected rows of tokens, sequences, got "),
        (dict(tokens=1, sequences=1, users=1), "expected rows of tokens, sequences, got .*users"),
        (dict(tokens=1, batch=1), "expected rows of tokens, sequences, got tokens, batch"),
        (dict(tokens=TOKENS + 1, sequences=1), "tokens: expected 0 to 9 rows, got 10"),
        (dict(tokens=1, sequences=SEQUENCES + 1), "sequences: expected 0 to 5 rows, got 6"),
        (dict(tokens=-1, sequences=1), "tokens: expected 0 to 9 rows, got -1"),
    ],
)
def test_a_replay_of_wrong_rows_is_an_error_and_writes_nothing(rows, message):
    chain = Chain()
    graph = chain.record()
    chain.fill(STEPS["one"])
    poison([*graph.outputs, *chain.caches])
    for call in (graph.replay, lambda **rows: graph.profile(1, **rows)):
        with pytest.raises(ValueError, match=f"StepGraph: {message}"):
            call(**rows)
    assert all(is_poisoned(tensor) for tensor in (*graph.outputs, *chain.caches))


BAD = {
    "ids": ("tokens", VOCAB, r"take_rows: index: expected values in \[0, 67\), got 67 at row 2"),
    "slots": ("tokens", USERS, r"slots: expected values in \[0, 4\), got 4 at row 2"),
    "positions": ("tokens", POSITIONS, r"positions: expected values in \[0, 24\), got 24"),
    "kv_slots": ("tokens", 120, r"kv_slots: expected values in \[-1, 120\), got 120"),
    "kv_lens": ("sequences", 25, "kv_lens of at most 24.*kv_lens 25 for request 2"),
    "tables": ("sequences", 30, r"block_tables: expected values in \[0, 30\), got 30"),
    "last": ("sequences", TOKENS, r"take_rows: index: expected values in \[0, 9\), got 9"),
    "forced": ("sequences", VOCAB, r"forced: expected values in \[-1, 67\), got 67"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("how", ["too large", "negative"])
def test_an_index_out_of_range_at_replay_is_an_error_before_anything_is_written(name, how):
    dimension, value, message = BAD[name]
    if how == "negative":
        value, message = -2, r"got (.*kv_lens )?-2"
    chain = Chain()
    graph = chain.record()
    rows = chain.fill(STEPS["all"])
    poison([*graph.outputs, *chain.caches])
    index = getattr(chain, dimension)[name]
    good = index.clone()
    index[2] = value
    with pytest.raises(ValueError, match=message):
        graph.replay(**rows)
    assert all(is_poisoned(tensor) for tensor in (*graph.outputs, *chain.caches))
    # The same number beyond the rows in use is not read.
    graph.replay(tokens=1, sequences=1) if name != "last" else None
    index.copy_(good)
    for cache in chain.caches:
        cache.zero_()
    check_replay_is_eager(chain, graph, STEPS["all"])


def test_every_table_an_index_goes_into_is_checked():
    """The same slots may be right for one table and wrong for a smaller one, in either order."""
    x, slots = torch.randn(3, 6), torch.zeros(3, dtype=torch.int32)
    large, small = torch.randn(5, 2, 6), torch.randn(2, 2, 6)
    weight, norm = pack_matrix(torch.randn(6, 6)), torch.ones(6)
    low_rank = dict(lora_a=torch.randn(2, 6), lora_b=torch.randn(6, 2), family="gated")
    steps = {
        5: lambda: residual_film_rms_norm(x, None, norm, large, slots, eps=0.0),
        2: lambda: residual_film_rms_norm(x, None, norm, small, slots, eps=0.0),
        0: lambda: residual_film_rms_norm(x, None, norm, small[:0], slots, eps=0.0),
        4: lambda: modulated_linear(x, weight, rows=torch_rows[4], slots=slots, **low_rank),
        3: lambda: modulated_linear(x, weight, rows=torch_rows[3], slots=slots, **low_rank),
    }
    torch_rows = {num_users: torch.randn(num_users, 2) for num_users in (3, 4)}
    plain = lambda: residual_film_rms_norm(x, None, norm, eps=0.0)  # noqa: E731
    for first, second in itertools.permutations(steps, 2):
        graph = StepGraph.record(
            lambda _, first=first, second=second: (plain(), steps[first](), steps[second]()),
            {"tokens": [x, slots]},
        )
        slots[:] = min(first, second)
        with pytest.raises(
            ValueError, match=r"slots: expected values in \[0, \d\), got \d at row 0"
        ):
            graph.replay(tokens=3)
        if min(first, second):
            slots[:] = min(first, second) - 1
            graph.replay(tokens=3)


@pytest.mark.parametrize(("now", "expected"), [(1, 1), (2, 2), (4, 2)])
def test_a_replay_has_torchs_threads_at_most_those_of_its_recording(now, expected):
    torch.set_num_threads(2)
    chain = Chain()
    graph = chain.record()
    native, given = graph._native, []

    class Native:
        def replay(self, dims, num_threads, is_main):
            given.append(num_threads)
            native.replay(dims, num_threads, is_main)

        def profile(self, dims, num_threads, repeats, is_main):
            given.append(num_threads)
            return native.profile(dims, num_threads, repeats, is_main)

    graph._native = Native()
    torch.set_num_threads(now)
    counts = chain.fill(STEPS["all"])
    graph.replay(**counts)
    graph.profile(1, **counts)
    assert given == [expected, expected]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_two_graphs_replay_at_once(num_threads):
    torch.set_num_threads(num_threads)
    chains = [Chain(seed=seed) for seed in (1, 2)]
    graphs = [chain.record() for chain in chains]
    rows = [chain.fill(STEPS[name]) for chain, name in zip(chains, ("all", "chunk"), strict=True)]
    expected, wrong = [], []
    for graph, counts in zip(graphs, rows, strict=True):
        graph.replay(**counts)
        expected.append([t.clone() for t in graph.outputs])

    def work(graph, counts, right):
        for _ in range(30):
            poison(graph.outputs)
            graph.replay(**counts)
            for got, old in zip(graph.outputs, right, strict=True):
                if not torch.equal(bits(got), bits(old)) and not is_poisoned(old):
                    used = counts["tokens" if len(old) == TOKENS else "sequences"]
                    wrong.append(not torch.equal(bits(got[:used]), bits(old[:used])))

    parts = zip(graphs, rows, expected, strict=True)
    threads = [threading.Thread(target=work, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(wrong)


def test_replay_releases_the_gil():
    """Another thread goes on in the middle of one replay, which is a single call."""
    x, weight = torch.randn(512, 512), pack_matrix(torch.randn(512, 512))

    def step():
        y = x
        for _ in range(60):
            y = modulated_linear(y, weight)
        return y

    graph = StepGraph.record(lambda _, step=step: step(), {"tokens": [x]})
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    before = sys.getswitchinterval()
    thread = threading.Thread(target=tick)
    thread.start()
    try:
        sys.setswitchinterval(1e-4)
        # Until one replay has lasted long enough to say something, on however fast a machine.
        seconds = inside = 0
        for _ in range(100):
            start = time.perf_counter()
            graph.replay(tokens=512)
            stop = time.perf_counter()
            middle = start + 0.2 * (stop - start), stop - 0.2 * (stop - start)
            inside += sum(middle[0] < tick < middle[1] for tick in ticks)
            seconds += stop - start
            if inside >= 5:
                break
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(before)
    assert inside >= 5, f"{inside} ticks in {seconds:.2f} s of replays"
