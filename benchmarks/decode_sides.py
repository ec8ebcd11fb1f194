"""What decodes in `benchmarks.cpu_decode` and is ours, its gates, and the machine's limits."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch

from benchmarks.modulated import LATENT_DIM, random_modulator
from benchmarks.text_gate import Gate
from fssa_kernels import PackArena
from fssa_kernels.native import NATIVE
from fssa_runtime.conditioning.merge import merged, reference_answer_logprobs
from fssa_runtime.conditioning.table import ModulationTable
from fssa_runtime.conditioning.user_weights import UserWeights
from fssa_runtime.engine.engine import Engine
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.request import Completion, Request, SamplingParams

PAGE = 16  # tokens, of `Engine`
OURS = ("base only", "one user", "all distinct")
PRODUCTS = (torch.bfloat16, torch.float32)


class Ours:
    """The three rows that are ours, on one set of packed weights, with room for ``row_tokens``
    tokens in every row of a batch and for two prefills."""

    def __init__(
        self, model: LanguageModel, max_batch: int, prefill_tokens: int, row_tokens: int = 256
    ) -> None:
        self.model = model
        self.modulator = random_modulator(model.decoder.config)
        self.table = ModulationTable(self.modulator.layout, max_batch)
        latents = torch.randn(max_batch, LATENT_DIM, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            self.users = [UserWeights.of_row(row) for row in self.modulator.rows(latents)]
        nobody = torch.zeros(0, dtype=torch.int32)
        modulation = self.modulator.bind(self.table.rows, nobody, dtype=model.decoder.dtype)
        limits = {
            "max_batch_size": max_batch,
            "max_batch_tokens": max(2048, prefill_tokens),
            "max_kv_tokens": max(max_batch * -(-row_tokens // PAGE) * PAGE, 2 * prefill_tokens),
            # The same prompt comes again and again, and is to be computed each time.
            "prefix_cache": False,
        }
        no_stops: frozenset[int] = frozenset()
        self.engines = {
            "base only": Engine(model.decoder, no_stops, **limits),
            "one user": Engine(model.decoder, no_stops, modulation, self.table, **limits),
        }
        self.engines["all distinct"] = self.engines["one user"]
        for name, engine in self.engines.items():
            if engine.runner.eager_reason is not None:
                raise RuntimeError(
                    f"{name}: the step is not replayed: {engine.runner.eager_reason}"
                )

    def requests(self, row: str, batch: int, prompt: list[int], new: int) -> list[Request]:
        users: list[UserWeights | None] = {
            "base only": [None] * batch,
            "one user": [self.users[0]] * batch,
            "all distinct": self.users[:batch],
        }[row]
        sampling = SamplingParams(max_tokens=new)
        return [Request(prompt, user, sampling) for user in users]

    def decode(self, row: str, batch: int, *, prompt: list[int], new: int) -> float:
        """Tokens a second of ``new`` steps, the prefill and its token left out."""
        started = [0.0]

        def on_token(index: int, _token: int) -> None:
            if not started[0] and index == batch - 1:
                started[0] = time.perf_counter()

        requests = self.requests(row, batch, prompt, new + 1)
        self.engines[row].generate(requests, on_token=on_token)
        return batch * new / (time.perf_counter() - started[0])

    def prefill(self, row: str, prompt: list[int]) -> float:
        start = time.perf_counter()
        self.engines[row].generate(self.requests(row, 1, prompt, 1))
        return len(prompt) / (time.perf_counter() - start)

    def step_bytes(self, row: str, batch: int, context: int) -> int:
        """What a decode step must read: packed weights, factors, keys and values."""
        config = self.model.decoder.config
        total = sum(weight.num_bytes for weight in self._weights())
        if row != "base only":
            total += sum(factor.num_bytes for factor in self._factors())
        kv = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim
        return total + batch * context * kv

    def token_flop(self, row: str, context: int) -> int:
        """What a decoded token must multiply and add: linears, factors, ``context`` keys."""
        config = self.model.decoder.config
        total = sum(2 * math.prod(weight.shape) for weight in self._weights())
        total += 4 * context * config.num_layers * config.num_heads * config.head_dim
        if row != "base only":
            total += sum(2 * math.prod(factor.shape) for factor in self._factors())
        return total

    def weight_bytes(self) -> dict[str, int]:
        """Of the weights that every step reads whole, as they are kept and in a checkpoint."""
        return {
            "kept": sum(weight.num_bytes for weight in self._weights()),
            "checkpoint": sum(
                math.prod(weight.shape) * weight.dtype.itemsize for weight in self._weights()
            ),
        }

    def _factors(self) -> list[Any]:
        """A and B of every linear, packed."""
        modulation = self.engines["all distinct"].runner.modulation
        assert modulation is not None
        terms = [term for layer in modulation.linears for term in layer.values()]
        return [factor for term in terms for factor in (term.lora_a, term.lora_b)]

    def _weights(self) -> list[Any]:
        """The packed matrices that every step reads whole."""
        decoder = self.model.decoder
        return [decoder.lm_head] + [
            getattr(layer, name) for layer in decoder.blocks for name, _, _ in layer.linears()
        ]


def check_ours(ours: Ours, gate: Gate, prompt: list[int], batch: int) -> dict[str, Any]:
    """What has to hold before a speed is printed; raises RuntimeError where it does not.

    Every row of a batch of distinct users is, to the bit, what that user gets alone; users differ;
    and the log-probabilities of what a user got are as close to fp32 as plain PyTorch's are at the
    same dtype with the user's weights merged by hand (at most twice its error, plus 0.01 nats).
    """
    together = ours.engines["all distinct"].generate(
        ours.requests("all distinct", batch, prompt, 24)
    )
    alone = [
        ours.engines["all distinct"].generate([request])[0]
        for request in ours.requests("all distinct", batch, prompt, 24)
    ]
    if any(
        a.tokens != b.tokens or a.logprobs != b.logprobs
        for a, b in zip(together, alone, strict=True)
    ):
        raise RuntimeError("gate: a row of the batch differs from the same user alone")
    distinct = len({tuple(c.logprobs) for c in together})
    if distinct != batch:
        raise RuntimeError(f"gate: {batch} users, {distinct} different results")
    errors = _errors(ours, gate, prompt, together[0])
    if not errors["ours"] <= 2 * errors["plain"] + 0.01:  # NaN fails
        raise RuntimeError(f"gate: mean error of log-probabilities {errors}")
    return {"rows_equal_alone": "bitwise", "distinct": distinct, "mean_abs_error": errors}


def _errors(ours: Ours, gate: Gate, prompt: list[int], completion: Completion) -> dict[str, float]:
    """Mean |Δ log p| of one user's text from fp32, ours and plain bf16 PyTorch's."""
    row = ours.users[0].make_row()
    scored = []
    for reference in (gate.exact, gate.plain):
        with merged(reference, ours.modulator, row) as own:
            scored.append(reference_answer_logprobs(own, prompt, completion.tokens))
    exact, plain = scored
    return {
        "ours": float((torch.tensor(completion.logprobs) - exact).abs().mean()),
        "plain": float((plain - exact).abs().mean()),
    }


class Limits:
    """What this machine can do at the moment, measured in turn with the sides."""

    def __init__(self) -> None:
        # On the pages that weights lie on.
        self._memory = PackArena().take(256 * 1024 * 1024).fill_(1)
        x, weight = torch.randn(1024, 1536), torch.randn(3072, 1536)
        self._products = [(x.to(dtype), weight.to(dtype)) for dtype in PRODUCTS]

    def stream(self, seconds: float = 0.3) -> float:
        """Bytes a second that all threads read."""
        assert NATIVE is not None
        memory, threads = self._memory, torch.get_num_threads()
        passes = 0
        start = time.perf_counter()
        while time.perf_counter() < start + seconds:
            NATIVE.stream_seconds(memory.data_ptr(), memory.numel(), threads)
            passes += 1
        return passes * memory.numel() / (time.perf_counter() - start)

    @staticmethod
    def barrier() -> float:
        """Seconds of a barrier, in which threads' cores read what others have written. It tells
        how far apart the cores are."""
        assert NATIVE is not None
        times = [NATIVE.barrier_seconds(10_000, torch.get_num_threads()) for _ in range(5)]
        return statistics.median(times)

    def product(self, seconds: float = 0.3) -> float:
        """FLOP a second of PyTorch's matrix product, in bf16 or fp32, whichever is faster."""
        rates = []
        for x, weight in self._products:
            passes = 0
            start = time.perf_counter()
            with torch.inference_mode():
                while time.perf_counter() < start + seconds / len(self._products):
                    torch.nn.functional.linear(x, weight)
                    passes += 1
            flop = 2 * x.shape[0] * weight.numel()
            rates.append(passes * flop / (time.perf_counter() - start))
        return max(rates)
