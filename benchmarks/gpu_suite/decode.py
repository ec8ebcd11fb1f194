"""Decode steps of whole models: base only, nobody, one user, every row another; and flatness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gate import Judgement
from benchmarks.gpu_suite.linears import check_rows
from benchmarks.gpu_suite.model import (
    Buffers,
    Rows,
    decode_step,
    judge_decoder,
    random_decoder,
    random_modulation,
    random_table,
    recorded,
)
from benchmarks.gpu_suite.problems import LinearProblem, Random
from benchmarks.gpu_suite.shapes import MODELS, ModelShape, row_width
from benchmarks.gpu_suite.suite import Side, Suite
from fssa_kernels import modulated_linear
from fssa_runtime.conditioning.modulation import Modulation
from fssa_runtime.models.decoder import Decoder

BASE = "base only"
ROWS = ("nobody", "one user", "all distinct")
OPS = (
    "modulated_linear",
    "residual_film_rms_norm",
    "rope_kv_write",
    "paged_attention",
    "take_rows",
    "sample",
)


class Model:
    """A model of a shape, its table, and the gate its rows stand behind."""

    def __init__(self, suite: Suite, name: str, num_users: int) -> None:
        scale = suite.scale
        self.suite, self.shape, self.rank = suite, MODELS[name], scale.ranks[0]
        self.judgement = judge_decoder(self.shape, self.rank, scale.page_size, suite.device)
        self.decoder: Decoder = random_decoder(
            self.shape, scale.context + 1, torch.bfloat16, suite.device
        )
        nobody = torch.zeros(0, dtype=torch.int32, device=suite.device)
        table = random_table(self.shape, self.rank, num_users, suite.device)
        self.modulation: Modulation = random_modulation(
            self.decoder, self.shape, self.rank, table, nobody
        )
        if self.decoder.can_pack:  # on a CPU, where the native kernels are
            self.decoder.pack()
            self.modulation = self.modulation.pack()

    def buffers(self, batch: int, context: int) -> Buffers:
        """Inputs of a step of nobody; sides of a contest share the keys and values."""
        nobody = torch.zeros(batch, dtype=torch.int32, device=self.suite.device)
        page_size = self.suite.scale.page_size
        return Buffers.random(self.decoder, batch, context, page_size, nobody)

    def side(
        self, modulation: Modulation | None, slots: Tensor | None, shared: Buffers, context: int
    ) -> Side:
        """A step on the shared buffers, with the slots of its own."""
        buffers = shared if slots is None else shared.with_slots(slots)
        batch = buffers.batch

        def step(rows: Rows) -> tuple[Tensor, Tensor]:
            return decode_step(self.decoder, modulation, buffers, rows)

        def eager() -> tuple[Tensor, Tensor]:
            return step(buffers.rows)

        work = step_work(self.shape, self.rank, batch, context, modulation is not None)
        graph, why = recorded(step, buffers)
        if graph is None:
            note = f"not recorded by StepGraph: {why}"
            return Side(lambda _: eager(), work, lambda: self._checked(eager()), OPS, True, 1, note)

        def replay(_: int) -> None:
            graph.replay(tokens=batch, sequences=batch)

        def check() -> Judgement:
            replay(0)
            return self._checked(graph.outputs)

        return Side(replay, work, check, OPS, graph=False, calls=4, note="StepGraph")

    def _checked(self, outputs: tuple[Tensor, Tensor]) -> Judgement:
        """The gate of the model's layers, and log-probabilities that are numbers."""
        if not bool(torch.isfinite(outputs[1]).all()):
            return Judgement(0.0, 0.0, "log-probabilities that are no numbers")
        return self.judgement


def step_work(
    shape: ModelShape, rank: int, batch: int, context: int, modulated: bool
) -> tuple[int, int]:
    """(bytes, flops) of a decode step: weights, factors, rows, keys and values, each read once."""
    head = shape.hidden * shape.vocab_size
    weights, low = head, 0
    for linear in shape.linears.values():
        weights += shape.num_layers * linear.num_columns * linear.in_features
        low += rank * (len(linear.splits) * linear.in_features + linear.num_columns)
    low *= shape.num_layers * modulated
    keys = batch * context * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    rows = batch * row_width(shape, rank) * modulated
    heads = shape.num_layers * shape.num_heads * shape.head_dim
    flops = 2 * batch * (weights + low) + 4 * batch * context * heads
    return 2 * (weights + low + keys) + 4 * rows, flops


def measure(suite: Suite) -> None:
    """Every decoder and batch size; the model of one is gone before the next is made."""
    scale = suite.scale
    for name in scale.decoders:
        loaded = _Lazy(lambda name=name: Model(suite, name, max(scale.batches)))

        def contest(batch: int, name: str = name, loaded: _Lazy = loaded) -> None:
            model = loaded.get()
            shared = model.buffers(batch, scale.context)
            distinct = torch.arange(1, batch + 1, dtype=torch.int32, device=suite.device)
            slots = {"one user": torch.ones_like(distinct), "all distinct": distinct}

            def maker(row: str) -> Callable[[], Side]:
                modulation = None if row == BASE else model.modulation
                return lambda: model.side(modulation, slots.get(row), shared, scale.context)

            key = {"model": name, "B": batch, "context": scale.context, "R": model.rank}
            suite.contest("decode", key, {row: maker(row) for row in (BASE, *ROWS)}, base=BASE)

        plan = [
            ({"model": name, "B": b}, lambda b=b, contest=contest: contest(b))
            for b in scale.batches
        ]
        suite.run("decode", plan)
        del loaded
        suite.clock.release()


def flatness(suite: Suite) -> None:
    """A linear, then a step of the first model, with ever more users in the table."""
    scale = suite.scale
    name, rank = scale.decoders[0], scale.ranks[0]
    tokens, sizes = scale.flat_tokens, scale.table_rows

    def linear() -> None:
        shape = MODELS[name].linears["o"]
        problem = LinearProblem(shape, tokens, "gated", rank, num_users=tokens)
        copies = scale.copies(problem.weight_bytes)
        bases = [problem.base(suite.device, torch.bfloat16, seed) for seed in range(copies)]
        term = problem.term(suite.device, torch.bfloat16)

        def maker(num_users: int) -> Callable[[], Side]:
            def make() -> Side:
                random = Random(suite.device, num_users)
                rows = random.normal(num_users + 1, rank, dtype=torch.bfloat16)
                rest = {**term, "rows": rows}
                every = [random.ints(1, num_users + 1, tokens) for _ in bases]

                def run(i: int) -> Tensor:
                    inputs = {**bases[i], **rest, "slots": every[i]}
                    return modulated_linear(**inputs, backend="triton")

                def check() -> Judgement:
                    return check_rows(lambda: run(0), {**bases[0], **rest, "slots": every[0]})

                return Side(run, problem.work(), check, ("modulated_linear",))

            return make

        key = {"what": "linear", "model": name, "linear": "o", "M": tokens, "R": rank}
        sides = {f"{n} users": maker(n) for n in sizes}
        suite.contest("flatness", key, sides, base=f"{sizes[0]} users", copies=copies)

    def step() -> None:
        model = Model(suite, name, 1)
        shared = model.buffers(tokens, scale.context)

        def maker(num_users: int) -> Callable[[], Side]:
            def make() -> Side:
                random = Random(suite.device, num_users)
                table = random_table(model.shape, rank, num_users, suite.device)
                slots = random.ints(1, num_users + 1, tokens)
                modulation = with_table(model.modulation, table)
                return model.side(modulation, slots, shared, scale.context)

            return make

        key = {"what": "step", "model": name, "B": tokens, "R": rank, "context": scale.context}
        sides = {f"{n} users": maker(n) for n in sizes}
        suite.contest("flatness", key, sides, base=f"{sizes[0]} users")

    suite.run("flatness", [({"what": "linear"}, linear), ({"what": "step"}, step)])


def with_table(modulation: Modulation, table: Tensor) -> Modulation:
    """The same factors, other users."""
    linears, offset = [], 0
    for terms in modulation.linears:
        own = {}
        for group, term in terms.items():
            assert term.rows is not None
            width = term.rows.shape[1]
            own[group] = replace(term, rows=table[:, offset : offset + width])
            offset += width
        linears.append(own)
    return Modulation(linears, modulation.films, modulation.slots)


class _Lazy:
    """A model made when it is first needed."""

    def __init__(self, make: Callable[[], Model]) -> None:
        self._make = make
        self._made: Model | None = None

    def get(self) -> Model:
        if self._made is None:
            self._made = self._make()
        return self._made
