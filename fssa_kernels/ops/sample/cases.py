"""Cases of sample: greedy, drawn, filtered, forced, and all of them in one batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fssa_kernels.testing import Inputs, OpCase, normal, num_bytes


@dataclass(frozen=True)
class _Sizes:
    batch: int = 5
    vocab_size: int = 131
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    forced: bool = False
    mixed: bool = False

    def make(self, g: torch.Generator, dtype: torch.dtype) -> Inputs:
        batch = self.batch
        inputs: Inputs = {
            "logits": normal(g, batch, self.vocab_size, dtype=dtype, std=2.0),
            "temperature": torch.full((batch,), self.temperature),
            "top_k": torch.full((batch,), self.top_k, dtype=torch.int32),
            "top_p": torch.full((batch,), self.top_p),
            "min_p": torch.full((batch,), self.min_p),
            "uniform": torch.rand(batch, generator=g),
            "forced": torch.full((batch,), -1, dtype=torch.int32),
        }
        if self.forced:
            inputs["forced"] = torch.randint(
                self.vocab_size, (batch,), generator=g, dtype=torch.int32
            )
        if self.mixed:
            inputs["temperature"][::2] = 0.0
            inputs["top_k"][1::3] = 4
            inputs["top_p"][1::2] = 0.7
            inputs["min_p"][3::4] = 0.05
            inputs["forced"][4:5] = 7
        return inputs


def _work(inputs: Inputs) -> tuple[int, int]:
    logits = inputs["logits"]
    return num_bytes(logits) + 8 * logits.shape[0], 0


_CASES = {
    "greedy": _Sizes(temperature=0.0),
    "greedy-large": _Sizes(temperature=0.0, batch=2, vocab_size=9001),
    "drawn": _Sizes(),
    "drawn-large": _Sizes(batch=3, vocab_size=9001),
    "empty": _Sizes(batch=0),
    "one-token": _Sizes(batch=1, vocab_size=1),
    "top-k": _Sizes(top_k=3),
    "top-p": _Sizes(top_p=0.6, vocab_size=4500),
    "min-p": _Sizes(min_p=0.2),
    "all-filters": _Sizes(top_k=40, top_p=0.9, min_p=0.01),
    "forced": _Sizes(forced=True),
    "mixed": _Sizes(batch=9, mixed=True),
}


def cases() -> Iterator[OpCase]:
    """Every case of sample."""
    for name, sizes in _CASES.items():
        yield OpCase("sample", name, sizes.make, _work)
