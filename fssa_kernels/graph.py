"""StepGraph: the ops of a step recorded once, then replayed without Python.

Python costs 10 to 60 us an op; a decode step of a small model has some 250 of them and floors at a
few milliseconds on a CPU, at a fraction of one on a GPU. On a CPU the recording is a list of native
calls (`graph_native`), on a GPU it is CUDA graphs (`gpu.graph`). Tokens, positions, slots, lengths
and pages are read from the static inputs at replay, so neither a new user nor a longer text needs
another recording.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fssa_kernels.native import RecordingError

Group = Sequence[Tensor] | Mapping[str, Tensor]
Inputs = Mapping[str, Group]
Step = Callable[[Any], Any]  # takes such inputs


@dataclass(frozen=True)
class Following:
    """How a recorded step leads to the next one, so that a graph can repeat it by itself.

    Attributes:
        advance: called once, while recording, with what the step returned; its ops run after every
            repetition and write the static inputs of the next (`advance_step`, say).
        ended: [rows] int32, a static input: repetition ends where one of the rows in use is not 0.
        interrupt: [1] int32: repetition ends where it is not 0. Any thread may write it, at any
            time; it is left as it is.
    """

    advance: Callable[[Any], None]
    ended: Tensor
    interrupt: Tensor


class StepGraph:
    """A recorded step; make one with `record`.

    On a CPU a replay runs on torch's number of threads at that moment, but on no more than there
    were when it was recorded: some ops have scratch memory for each thread.

    Attributes:
        outputs: what the step returned; holds the last replay's results, which the next one
            overwrites. They have as many rows as the recording: the first ones count.
        capacity: rows at most, by dimension.
        can_repeat: whether `repeat` may run the step more than once.
    """

    can_repeat = False

    def __init__(self, capacity: Mapping[str, int], outputs: Any) -> None:
        self.capacity = dict(capacity)
        self.outputs = outputs

    @staticmethod
    def record(step: Step, inputs: Inputs, following: Following | None = None) -> StepGraph:
        """Record what ``step(inputs)`` computes from static inputs.

        ``following``: how the next step's inputs follow, which `repeat` needs; on a GPU nothing is
        made of it, since a graph there cannot tell by itself that it is over.

        ``inputs`` names the dimensions ("tokens", say); the tensors of one, a sequence or a mapping
        of names, have as many rows, which is the dimension's capacity. Whatever is computed from
        them has as many rows. A replay with fewer rows reads the first ones.

        On a CPU only ops of this package may compute inside ``step``, and views; anything else
        raises RecordingError, because a replay would not repeat it. So does an op that has no
        native kernel for its inputs, with the reason. Rows of what an op returns there need not
        follow one another (``stride(0)`` says where they are), so no view runs across them.

        On a GPU a CUDA graph has a fixed number of rows, so ``step`` is recorded again for every
        bucket of rows that a replay meets first, with the first rows of the inputs. A replay then
        computes the rows past those asked for, up to the bucket: **what lies there must be
        harmless** (slot 0, a KV slot of -1, lengths of 0). What cannot be captured (a host
        synchronisation, say) raises RecordingError.

        Raises ValueError for a dimension without tensors, for tensors of one dimension that differ
        in rows or device, and for an ``ended`` that is no input or an ``interrupt`` that is not one
        int32 number.
        """
        capacity, device = _check_inputs(inputs)
        if device.type == "cuda":
            from fssa_kernels.gpu.graph import CudaStepGraph

            return CudaStepGraph(step, inputs, capacity)
        if device.type != "cpu":
            raise RecordingError(f"StepGraph: expected inputs on the CPU or a GPU, got {device}")
        from fssa_kernels.graph_native import NativeStepGraph

        return NativeStepGraph(step, inputs, capacity, following)

    def replay(self, **rows: int) -> None:
        """Run the step on the first ``rows`` of each dimension: ``replay(tokens=5, sequences=5)``.

        On a GPU the work is queued on the current stream. One thread at a time may replay a graph,
        and it has to itself what the graph reads and writes.

        Raises ValueError for a missing or unknown dimension, more rows than the capacity, and on a
        CPU for indices out of range, RuntimeError on a CPU while another thread replays the graph;
        all before anything is written. On a CPU the main thread looks for signals between ops, and
        what a handler raises (KeyboardInterrupt) ends the replay with part of it written.
        """
        self._check(rows)
        self._replay(rows)

    def repeat(self, rows: Mapping[str, int], times: int, seconds: float = math.inf) -> int:
        """Run the step up to ``times`` times, each from what the one before has left; how often.

        ``rows`` are those of `replay`, in every repetition. It ends early by `Following`, and
        where the next one would end later than ``seconds`` after the first began, if it takes as
        long as the one before.

        Raises ValueError for ``times`` below 1, and above 1 unless `can_repeat`; otherwise as
        `replay`. Indices are checked again before every repetition: what those before wrote stays.
        """
        if times < 1 or (times > 1 and not self.can_repeat):
            expected = "at least 1" if self.can_repeat else "1: nothing says what follows the step"
            raise ValueError(f"StepGraph: times: expected {expected}, got {times}")
        self._check(rows)
        return self._repeat(rows, times, seconds)

    def _check(self, rows: Mapping[str, int]) -> None:
        if rows.keys() != self.capacity.keys():
            expected = ", ".join(self.capacity)
            raise ValueError(f"StepGraph: expected rows of {expected}, got {', '.join(rows)}")
        for name, count in rows.items():
            if not 0 <= count <= self.capacity[name]:
                raise ValueError(
                    f"StepGraph: {name}: expected 0 to {self.capacity[name]} rows, got {count}"
                )

    def _replay(self, rows: Mapping[str, int]) -> None:
        raise NotImplementedError

    def _repeat(self, rows: Mapping[str, int], times: int, seconds: float) -> int:
        self._replay(rows)
        return 1


def tensors_of(group: Group) -> list[Tensor]:
    """The tensors of one dimension."""
    return list(group.values() if isinstance(group, Mapping) else group)


def _check_inputs(inputs: Inputs) -> tuple[dict[str, int], Any]:
    """(capacity by dimension, the device of all inputs)."""
    capacity: dict[str, int] = {}
    device = None
    for name, group in inputs.items():
        tensors = tensors_of(group)
        if not tensors:
            raise ValueError(f"StepGraph: {name}: expected at least one input, got none")
        for tensor in tensors:
            device = device or tensor.device
            if tensor.device != device:
                raise ValueError(
                    f"StepGraph: {name}: expected every input on {device}, got {tensor.device}"
                )
            if tensor.shape[0] != capacity.setdefault(name, tensor.shape[0]):
                raise ValueError(
                    f"StepGraph: {name}: expected {capacity[name]} rows in every input, "
                    f"got {tensor.shape[0]}"
                )
    if device is None:
        raise ValueError("StepGraph: expected at least one dimension, got none")
    return capacity, device
