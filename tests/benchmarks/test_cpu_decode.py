"""The decoding benchmark: its gates, what whoever ends a run early has, what the ratios are of."""

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console

from benchmarks import cpu_decode, text_gate
from benchmarks.cpu_decode import first_round, measure, summarise
from benchmarks.decode_sides import OURS, Ours, check_ours
from benchmarks.peers.lora import RANK
from benchmarks.text_gate import Gate
from benchmarks.worker_process import WorkerError
from fssa_kernels.native import NATIVE
from fssa_runtime.models.language_model import LanguageModel
from tests.runtime.models import write_model

BATCH = 4
PROMPT = [*b"What is bread?"]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Ours:
    if NATIVE is None:
        pytest.skip("the native kernels are not built")
    folder = write_model(tmp_path_factory.mktemp("model"))
    return Ours(LanguageModel.load(str(folder), dtype="bfloat16"), BATCH, 64)


@pytest.fixture(scope="module")
def gate(ours: Ours) -> Gate:
    return Gate(ours.model.folder)


def test_the_gate_of_ours_passes_what_is_right(ours: Ours, gate: Gate) -> None:
    passed = check_ours(ours, gate, PROMPT, BATCH)
    assert passed["distinct"] == BATCH
    assert passed["mean_abs_error"]["ours"] < 0.1


class Tampered:
    """An engine that answers as another does, but for what ``change`` does to the n-th call."""

    def __init__(self, engine: Any, change: Any) -> None:
        self.engine, self.change, self.calls = engine, change, 0

    def generate(self, requests: Any) -> Any:
        completions = self.engine.generate(requests)
        self.calls += 1
        self.change(self.calls, completions)
        return completions


def _a_row_differs(call: int, completions: Any) -> None:
    if call == 3:  # the second user alone
        completions[0].logprobs[5] += 1e-6


def _all_are_one_user(call: int, completions: Any) -> None:
    for completion in completions:
        completion.tokens[:] = [7] * 24
        completion.logprobs[:] = [-1.0] * 24


def _all_are_off(call: int, completions: Any) -> None:
    for completion in completions:
        completion.logprobs[:] = [logprob - 0.5 for logprob in completion.logprobs]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_a_row_differs, "differs from the same user alone"),
        (_all_are_one_user, "4 users, 1 different"),
        (_all_are_off, "mean error"),
    ],
)
def test_the_gate_of_ours_fails(
    ours: Ours, gate: Gate, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    monkeypatch.setitem(
        ours.engines, "all distinct", Tampered(ours.engines["all distinct"], change)
    )
    with pytest.raises(RuntimeError, match=message):
        check_ours(ours, gate, PROMPT, BATCH)


def test_the_limits_count_what_a_step_reads_and_multiplies(ours: Ours) -> None:
    hidden, inner, kv, layers, vocab = 48, 80, 24, 3, 384
    weights = layers * (2 * hidden**2 + 2 * hidden * kv + 3 * hidden * inner) + hidden * vocab
    factors = layers * RANK * (2 * 2 * hidden + 2 * (hidden + kv) + 3 * (hidden + inner))
    assert ours.token_flop("base only", 0) == 2 * weights
    assert ours.token_flop("all distinct", 0) == 2 * weights + 2 * factors
    assert ours.token_flop("one user", 10) - ours.token_flop("one user", 0) == 4 * 10 * 3 * 48
    assert ours.step_bytes("base only", 1, 0) >= 2 * weights
    of_factors = ours.step_bytes("all distinct", 1, 0) - ours.step_bytes("base only", 1, 0)
    assert (
        2 * factors <= of_factors <= 2.2 * factors
    )  # halves of 16 columns, of which some are less
    assert ours.weight_bytes()["checkpoint"] == 2 * weights
    assert ours.weight_bytes()["kept"] == ours.step_bytes("base only", 1, 0)
    assert ours.step_bytes("one user", 3, 10) - ours.step_bytes("one user", 3, 0) == (
        3 * 10 * layers * 2 * kv * 2
    )


class Decoded(NamedTuple):
    first_tokens: list[list[int]]
    tokens: int = 30
    seconds: float = 2.0


class FakePeer:
    """Writes what a model would, greedily, under each row's adapter if it has adapters."""

    adapters = False

    def __init__(self, gate: Gate, work: Path) -> None:
        self.gate, self.work, self.closed = gate, work, False

    def decode(self, batch: int, prompt: list[int], new: int) -> Decoded:
        return Decoded([self._write(row, prompt) for row in range(batch)])

    def prefill(self, prompt: list[int]) -> Decoded:
        return Decoded([])

    def close(self) -> None:
        self.closed = True

    @contextmanager
    def _worn(self, row: int) -> Iterator[Any]:
        if not self.adapters:
            yield self.gate.exact
            return
        folder = Path(self.gate.exact.config._name_or_path)
        adapter = text_gate.lora.adapter(folder, self.work, row)
        with text_gate._adapted(self.gate.exact, adapter) as model:
            yield model

    def _write(self, row: int, prompt: list[int]) -> list[int]:
        tokens = list(prompt)
        with self._worn(row) as model, torch.no_grad():
            for _ in range(6):
                logits = model(torch.tensor([tokens]), use_cache=False).logits
                tokens.append(int(logits[0, -1].argmax()))
        return tokens[len(prompt) :]


class WithAdapters(FakePeer):
    adapters = True


class AdaptersMixedUp(WithAdapters):
    def decode(self, batch: int, prompt: list[int], new: int) -> Decoded:
        return Decoded(super().decode(batch, prompt, new).first_tokens[::-1])


class RowMissing(FakePeer):
    def decode(self, batch: int, prompt: list[int], new: int) -> Decoded:
        return Decoded(super().decode(max(1, batch - 1), prompt, new).first_tokens)


class Dies(FakePeer):
    def prefill(self, prompt: list[int]) -> Decoded:
        raise WorkerError("the worker ended")


def test_peers_are_judged_at_every_batch_size_and_left_out_if_they_fail(
    ours: Ours, gate: Gate, tmp_path: Path
) -> None:
    kinds = {
        "right": FakePeer,
        "adapters": WithAdapters,
        "mixed up": AdaptersMixedUp,
        "missing": RowMissing,
        "dies": Dies,
    }
    all_peers = {name: kind(gate, tmp_path) for name, kind in kinds.items()}
    peers: Any = dict(all_peers)
    losses, failed = first_round(
        ours,
        peers,
        [1, 3],
        gate,
        prompt=PROMPT,
        long_prompt=PROMPT * 3,
        new=4,
        console=Console(file=io.StringIO()),
    )
    assert list(peers) == list(losses) == ["right", "adapters"]
    assert all(set(of_batches) == {"1", "3"} for of_batches in losses.values())
    assert "gate: batch 3: mean loss" in failed["mixed up"]
    assert failed["missing"] == "gate: batch 3: tokens for 2 rows"
    assert failed["dies"] == "the worker ended"
    assert {name for name, peer in all_peers.items() if peer.closed} == set(failed)


class FixedLimits:
    def stream(self) -> float:
        return 1e9

    def product(self) -> float:
        return 1e10

    def barrier(self) -> float:
        return 2e-7


class FakeOurs:
    """Decodes at 100 tokens a second a row, the n-th time n faster; reads 4 MB a step."""

    def __init__(self) -> None:
        self.calls = 0

    def decode(self, row: str, batch: int, *, prompt: list[int], new: int) -> float:
        self.calls += 1
        return 100.0 * batch + self.calls

    def prefill(self, row: str, prompt: list[int]) -> float:
        return 50.0

    def step_bytes(self, row: str, batch: int, context: int) -> int:
        return 4_000_000

    def token_flop(self, row: str, context: int) -> int:
        return 2_000_000

    def weight_bytes(self) -> dict[str, int]:
        return {"kept": 3_000_000, "checkpoint": 4_000_000}


class FailingPeer:
    """Fails in the middle of the second round."""

    def __init__(self) -> None:
        self.calls = 0

    def decode(self, batch: int, prompt: list[int], new: int) -> Decoded:
        self.calls += 1
        if self.calls == 4:
            raise WorkerError("no more")
        return Decoded([])

    def prefill(self, prompt: list[int]) -> Decoded:
        return Decoded([])


def test_what_was_measured_before_a_run_ends_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_decode, "Limits", FixedLimits)
    ours: Any = FakeOurs()
    peers: Any = {"peer": FailingPeer()}
    rounds = measure(
        ours,
        peers,
        [1, 8],
        prompt=[1],
        long_prompt=[1, 2],
        new=4,
        rounds=3,
        console=Console(file=io.StringIO()),
    )
    kept = copy.deepcopy(next(rounds))
    with pytest.raises(WorkerError, match="no more"):
        next(rounds)
    assert {batch: set(map(len, sides.values())) for batch, sides in kept["decode"].items()} == {
        "1": {1},
        "8": {1},
    }
    assert {name: len(values) for name, values in kept["prefill"].items()} == dict.fromkeys(
        [*OURS, "peer"], 1
    )

    assert [limits["barrier_s"] for limits in kept["limits"].values()] == [[2e-7], [2e-7]]

    summary = summarise(kept, ours, 10)
    one = summary["decode"]["1"]
    assert one["peer"]["tokens_per_s"] == 15.0
    measured = one["all distinct"]["tokens_per_s"]
    assert one["peer"]["all_distinct_over_this"] == measured / 15.0
    assert one["all distinct"]["fraction_of_stream"] == pytest.approx(4e6 * measured / 1e9)
    assert one["all distinct"]["fraction_of_product"] == pytest.approx(2e6 * measured / 1e10)
    assert summary["prefill"]["peer"]["all_distinct_over_this"] == pytest.approx(50.0 / 15.0)
    # Ours are taken twice a round, the second time in reverse: the mean is the same for all three.
    assert {one[name]["tokens_per_s"] for name in OURS} == {measured}
