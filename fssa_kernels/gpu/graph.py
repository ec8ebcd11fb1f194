"""A step recorded as CUDA graphs, one for every bucket of rows; see `graph.StepGraph`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from fssa_kernels.gpu.workspace import Workspace, own_workspace
from fssa_kernels.graph import Group, Inputs, Step, StepGraph, tensors_of
from fssa_kernels.native import RecordingError

Bucket = tuple[int, ...]
# A capture begins by waiting for the device, which none that is under way in another thread allows.
_RECORDING = threading.Lock()


class Captured(Protocol):
    """One captured graph: replaying it computes the outputs that capturing returned."""

    def replay(self) -> None: ...


Capture = Callable[[Callable[[], Any]], tuple[Captured, Any]]


class CudaStepGraph(StepGraph):
    """A recorded step on a GPU; made by `StepGraph.record`.

    Buckets are powers of two up to the capacity. A bucket is captured when a replay first needs it,
    which runs the step twice over to have kernels compiled and memory at hand; all share one pool
    of memory, so `outputs` of one bucket are gone after the replay of another.

    Arguments:
        capture: how a call is captured; CUDA's way if left out.
    """

    def __init__(
        self,
        step: Step,
        inputs: Inputs,
        capacity: Mapping[str, int],
        capture: Capture | None = None,
    ) -> None:
        super().__init__(capacity, None)
        self._step = step
        self._inputs = inputs
        self._workspace = Workspace()
        device = tensors_of(next(iter(inputs.values())))[0].device
        self._capture = capture or CudaCapture(device)
        self._graphs: dict[Bucket, tuple[Captured, Any]] = {}

    @property
    def buckets(self) -> list[Bucket]:
        """Rows of each dimension of the graphs captured so far, in order of capture."""
        return list(self._graphs)

    def _replay(self, rows: Mapping[str, int]) -> None:
        bucket = tuple(bucket_of(rows[name], most) for name, most in self.capacity.items())
        graph = self._graphs.get(bucket)
        if graph is None:
            graph = self._record(bucket)
            self._graphs[bucket] = graph
        captured, self.outputs = graph
        captured.replay()

    def _record(self, bucket: Bucket) -> tuple[Captured, Any]:
        parts = {
            name: first_rows(group, count)
            for (name, group), count in zip(self._inputs.items(), bucket, strict=True)
        }
        with _RECORDING, torch.inference_mode(), own_workspace(self._workspace):
            return self._capture(lambda: self._step(parts))


class CudaCapture:
    """Captures calls on one GPU, on a stream and in a memory pool of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], Any]) -> tuple[Captured, Any]:
        """Run it twice, then capture it; RecordingError for what a graph cannot hold."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(2):
                    call()
            outside = torch.cuda.current_stream()
            outside.wait_stream(self._stream)
            cause: Exception | None = None
            try:
                # Other threads may go on using the GPU meanwhile. torch leaves its stream only
                # where the capture ends well, hence the outer context.
                with (
                    torch.cuda.stream(outside),
                    torch.cuda.graph(
                        graph,
                        pool=self._pool,
                        stream=self._stream,
                        capture_error_mode="thread_local",
                    ),
                ):
                    try:
                        outputs = call()
                    except Exception as error:
                        cause = error  # the end of the capture may raise another
                        raise
            except RuntimeError as error:
                reason = cause or error
                raise RecordingError(f"StepGraph: the step cannot be captured: {reason}") from error
        return graph, outputs


def bucket_of(rows: int, most: int) -> int:
    """The next power of two, but `most` at most; 1 for no rows, since a graph of nothing fails."""
    return min(most, 1 << max(0, rows - 1).bit_length())


def first_rows(group: Group, count: int) -> Group:
    """The same tensors with their first rows only, in the same structure."""
    if isinstance(group, Mapping):
        return {name: tensor[:count] for name, tensor in group.items()}
    return [tensor[:count] for tensor in group]
