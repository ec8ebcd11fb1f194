"""What CUDA step graphs do apart from CUDA: buckets, narrowed inputs, and when they record."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fssa_kernels import StepGraph
from fssa_kernels.gpu import workspace
from fssa_kernels.gpu.graph import CudaCapture, CudaStepGraph, bucket_of
from fssa_kernels.gpu.workspace import Workspace, counters, own_workspace
from fssa_kernels.native import RecordingError


class FakeCapture:
    """Computes at every replay what was captured, into the outputs of the capture."""

    def __init__(self):
        self.shapes = []

    def __call__(self, call):
        outputs = call()
        self.shapes.append(tuple(outputs.shape))

        class Graph:
            @torch.inference_mode()
            def replay(self):
                outputs.copy_(call())

        return Graph(), outputs


def recorded(capture):
    inputs = {
        "tokens": {"ids": torch.arange(9), "weight": torch.ones(9)},
        "sequences": [torch.zeros(5)],
    }

    def step(rows):
        ids, weight = rows["tokens"]["ids"], rows["tokens"]["weight"]
        assert len(ids) == len(weight)
        return (ids * weight)[:, None] + rows["sequences"][0].sum()

    return inputs, CudaStepGraph(step, inputs, {"tokens": 9, "sequences": 5}, capture)


def test_a_bucket_is_captured_once_and_reads_its_inputs_at_replay():
    capture = FakeCapture()
    inputs, graph = recorded(capture)
    for tokens, sequences in [(1, 1), (3, 2), (4, 2), (3, 2), (9, 5), (5, 5), (8, 5)]:
        inputs["tokens"]["ids"].random_(100)
        inputs["sequences"][0].normal_()
        graph.replay(tokens=tokens, sequences=sequences)
        seen = inputs["sequences"][0][: bucket_of(sequences, 5)].sum()
        expected = inputs["tokens"]["ids"][:tokens, None] + seen
        torch.testing.assert_close(graph.outputs[:tokens], expected)
    assert graph.buckets == [(1, 1), (4, 2), (9, 5), (8, 5)]
    assert capture.shapes == [(1, 1), (4, 1), (9, 1), (8, 1)]


@pytest.mark.parametrize(
    ("rows", "bucket"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 100), (100, 100)]
)
def test_buckets_are_powers_of_two_up_to_the_capacity(rows, bucket):
    assert bucket_of(rows, 100) == bucket


def test_rows_are_checked_as_everywhere():
    _, graph = recorded(FakeCapture())
    with pytest.raises(ValueError, match="tokens: expected 0 to 9 rows, got 10"):
        graph.replay(tokens=10, sequences=1)
    with pytest.raises(ValueError, match="expected rows of tokens, sequences, got tokens"):
        graph.replay(tokens=1)
    assert not graph.buckets


def test_what_cannot_be_captured_leaves_no_bucket():
    def capture(call):
        raise RecordingError("no")

    _, graph = recorded(capture)
    with pytest.raises(RecordingError, match="no"):
        graph.replay(tokens=1, sequences=1)
    assert not graph.buckets


class FakeStreams:
    """Current streams and graphs without a GPU; a capture that has failed cannot be ended."""

    def __init__(self, monkeypatch):
        self.current = self.Stream(None)
        fakes = dict(
            Stream=self.Stream,
            CUDAGraph=self.Graph,
            stream=lambda stream: self.Entered(self, stream),
            current_stream=lambda: self.current,
            device=contextlib.nullcontext,
            graph_pool_handle=lambda: (0, 1),
            synchronize=lambda: None,
            empty_cache=lambda: None,
        )
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)

    class Entered:
        def __init__(self, streams, stream):
            self.streams, self.stream = streams, stream

        def __enter__(self):
            self.before, self.streams.current = self.streams.current, self.stream

        def __exit__(self, *exception):
            self.streams.current = self.before

    class Stream:
        def __init__(self, device):
            pass

        def wait_stream(self, other):
            pass

    class Graph:
        def capture_begin(self, *pool, **options):
            pass

        def capture_end(self):
            raise RuntimeError("operation failed due to a previous error during capture")


def test_a_failed_capture_says_why_and_leaves_its_stream(monkeypatch):
    streams = FakeStreams(monkeypatch)
    outside = streams.current
    capture, calls = CudaCapture(torch.device("cpu")), []

    def call():
        calls.append(streams.current)
        if len(calls) == 3:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RecordingError, match="cannot be captured: operation not permitted when"):
        capture(call)
    assert calls == 3 * [capture._stream]
    assert streams.current is outside


def test_inputs_of_different_devices_are_refused():
    inputs = {"tokens": [torch.zeros(3)], "sequences": [torch.zeros(3, device="meta")]}
    with pytest.raises(ValueError, match="sequences: expected every input on cpu, got meta"):
        StepGraph.record(lambda rows: None, inputs)
    with pytest.raises(RecordingError, match="on the CPU or a GPU, got meta"):
        StepGraph.record(lambda rows: None, {"tokens": [torch.zeros(3, device="meta")]})


def test_a_graph_counts_in_memory_of_its_own_that_it_never_gives_up():
    cpu, own = torch.device("cpu"), Workspace()
    shared = counters(10, cpu)
    with own_workspace(own):
        first = counters(10, cpu)
        assert counters(20, cpu).data_ptr() == first.data_ptr()
        larger = counters(5000, cpu)
    assert len(larger) >= 5000
    assert first.data_ptr() != shared.data_ptr()
    assert any(held is first for held in own._outgrown)
    assert counters(10, cpu).data_ptr() == shared.data_ptr()


def test_threads_record_one_after_another_and_count_apart():
    cpu, shared = torch.device("cpu"), counters(10, torch.device("cpu"))
    inside, most, found = [], [], {}

    def capture(call):
        inside.append(None)
        time.sleep(0.05)  # for the other to come as well
        most.append(len(inside))
        found[threading.get_ident()] = counters(10, cpu).data_ptr()
        inside.pop()
        return FakeCapture()(call)

    def record():
        recorded(capture)[1].replay(tokens=1, sequences=1)

    others = [threading.Thread(target=record) for _ in range(2)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert most == [1, 1]
    assert len({shared.data_ptr(), *found.values()}) == 3
    with own_workspace(Workspace()), ThreadPoolExecutor(1) as other:
        assert other.submit(counters, 10, cpu).result().data_ptr() == shared.data_ptr()


def test_a_capture_that_is_not_ours_gets_counters_that_it_clears_itself(monkeypatch):
    """One graph must not rely on zeros that another one writes when it is replayed."""
    cpu = torch.device("cpu")
    kept = counters(10, cpu)
    monkeypatch.setattr(workspace, "_is_capturing", lambda device: True)
    first, second = counters(10, cpu), counters(10, cpu)
    assert len({held.data_ptr() for held in (kept, first, second)}) == 3
    assert not first.any()
    assert not second.any()
    with own_workspace(Workspace()):
        assert counters(10, cpu).data_ptr() == counters(10, cpu).data_ptr()


def test_counters_that_are_kept_are_not_allocated_by_a_thread_that_may_have_a_pool(monkeypatch):
    threads, zeros = [], torch.zeros

    def seen(*args, **options):
        threads.append(threading.get_ident())
        return zeros(*args, **options)

    monkeypatch.setattr(torch, "zeros", seen)
    Workspace().counters(10, torch.device("cpu"))
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()
