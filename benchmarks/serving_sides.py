"""What serves in `benchmarks.serving`: our engine in three ways, and the peers."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.modulated import LATENT_DIM, random_modulator
from benchmarks.peers import lora
from benchmarks.peers.client import Peer
from benchmarks.peers.play import Ask, Played, play
from benchmarks.text_gate import Wear, wear_adapters
from fssa_runtime.conditioning.merge import merged
from fssa_runtime.conditioning.table import ModulationTable
from fssa_runtime.conditioning.user_weights import UserWeights
from fssa_runtime.engine.engine import Engine
from fssa_runtime.engine.slots import SlotCache
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.request import Request, SamplingParams

SIDES = ("base only", "one user", "all distinct")
ALONE = "all distinct, one at a time"
# Of users' weights: with these, the gate sees whose they are in what is written.
STRENGTH = 8.0
PEERS = {
    "llama.cpp": "llama_cpp",
    "vllm": "vllm",
    "vllm_lora": "vllm_lora",
    "hf": "hf",
    "peft": "peft",
}


@dataclasses.dataclass
class Side:
    """Something that serves. ``play`` takes requests and whether users come back.

    ``wear``: whose weights each request is judged under, or None for the base model's.
    """

    play: Callable[[Sequence[Ask], bool], Played]
    wear: Callable[[Sequence[Ask]], Wear] | None = None


class Ours:
    """One model, engines with and without modulation, and people."""

    def __init__(self, model: LanguageModel, options: argparse.Namespace) -> None:
        self.model, self.options = model, options
        self.modulator = random_modulator(model.decoder.config)
        self._people: dict[int, UserWeights] = {}

    def side(self, name: str) -> Side:
        def wear(asked: Sequence[Ask]) -> Wear:
            return lambda model, index: merged(
                model, self.modulator, self._user(name, asked[index]).make_row()
            )

        return Side(
            lambda asked, come_back: self.play(name, asked, prefix_cache=come_back),
            None if name == "base only" else wear,
        )

    def play(self, name: str, asked: Sequence[Ask], *, prefix_cache: bool) -> Played:
        engine = self._engine(name, prefix_cache=prefix_cache)
        requests = [
            Request(
                ask.prompt_tokens,
                None if name == "base only" else self._user(name, ask),
                SamplingParams(max_tokens=ask.new_tokens),
            )
            for ask in asked
        ]
        indices: dict[int, int] = {}

        def add(index: int) -> None:
            indices[engine.add(requests[index])] = index

        def step() -> list[tuple[int, int]]:
            return [(indices[event.request], event.token) for event in engine.step()]

        return play(asked, add, step)

    def slot_costs(self, num_users: int = 500) -> dict[str, float]:
        """Milliseconds, in the median, to find a user's row in the table and to fill one anew from
        the latent, in place of who has not written for longest."""
        table = ModulationTable(self.modulator.layout, 64)
        slots = SlotCache(table)
        latents = torch.randn(num_users, LATENT_DIM, generator=torch.Generator().manual_seed(1))

        def weights(z: torch.Tensor) -> UserWeights:
            return UserWeights(z.numpy().tobytes(), lambda: self.modulator.rows(z[None])[0])

        times: dict[str, list[float]] = {"fill_ms": [], "find_ms": []}
        for user in map(weights, latents):
            for kind in ("fill_ms", "find_ms"):
                start = time.perf_counter()
                slots.acquire(user)
                times[kind].append(1e3 * (time.perf_counter() - start))
                slots.release(user)
        assert slots.stats.filled == slots.stats.found == num_users
        return {kind: statistics.median(each) for kind, each in times.items()}

    def _engine(self, name: str, *, prefix_cache: bool) -> Engine:
        batch = 1 if name == ALONE else self.options.concurrency
        limits: dict[str, Any] = {
            "max_batch_size": batch,
            "max_batch_tokens": step_tokens(batch),
            "max_kv_tokens": batch * 2 * (self.options.prompt_tokens + self.options.output_tokens),
            "prefix_cache": prefix_cache,
        }
        decoder = self.model.decoder
        if name == "base only":
            return Engine(decoder, frozenset(), **limits)
        table = ModulationTable(self.modulator.layout, max(batch, 64))
        nobody = torch.zeros(0, dtype=torch.int32)
        modulation = self.modulator.bind(table.rows, nobody, dtype=decoder.dtype)
        return Engine(decoder, frozenset(), modulation, table, **limits)

    def _user(self, name: str, ask: Ask) -> UserWeights:
        number = 0 if name == "one user" else ask.user
        if number not in self._people:
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                row = self.modulator.rows(torch.randn(1, LATENT_DIM, generator=generator))[0]
            self._people[number] = UserWeights.of_row(STRENGTH * row)
        return self._people[number]


def peer_side(peer: Peer, model: Path, concurrency: int) -> Side:
    """A peer with a started worker; ``model`` is the folder it was started on."""

    def wear(asked: Sequence[Ask]) -> Wear:
        numbers = lora.numbers([ask.user for ask in asked])
        return wear_adapters(numbers, model, peer.work)

    return Side(
        lambda asked, _: peer.serve(asked, concurrency, step_tokens(concurrency)),
        wear if peer.adapters else None,
    )


def step_tokens(batch: int) -> int:
    """Tokens of a step at most, on every side."""
    return max(batch, 512)
