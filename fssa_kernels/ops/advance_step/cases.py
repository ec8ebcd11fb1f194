"""Cases of advance_step: rows that go on, stop, are full, have no step left, or are idle."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fssa_kernels.testing import Inputs, OpCase, num_bytes

_VOCAB = 50


@dataclass(frozen=True)
class _Sizes:
    """Sizes of one case. Every third row stops, every fourth is idle, in a mixed one."""

    batch: int = 5
    num_tokens: int = 5
    max_steps: int = 4
    max_pages: int = 3
    page_size: int = 4
    num_stops: int = 2
    mixed: bool = False
    strided: bool = False

    def make(self, g: torch.Generator, dtype: torch.dtype) -> Inputs:
        def ints(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=g, dtype=torch.int32)

        batch, steps = self.batch, self.max_steps
        chosen = ints(_VOCAB, batch)
        stop_tokens = ints(_VOCAB, batch, self.num_stops) + _VOCAB
        stop_tokens[:, self.num_stops // 2 :] = -1
        logprobs = -torch.rand(batch, generator=g)
        num_done = ints(steps, batch)
        kv_lens = 1 + ints(self.max_pages * self.page_size, batch)
        if self.mixed:
            if self.num_stops:
                stop_tokens[::3, 0] = chosen[::3]
            kv_lens[3::4] = 0
            logprobs[1::5] = float("nan")
            num_done[2::7] = steps
        wide = steps + 3 if self.strided else steps
        return {
            "chosen": chosen,
            "logprobs": logprobs,
            "tokens": ints(_VOCAB, self.num_tokens),
            "positions": ints(9, self.num_tokens),
            "kv_slots": ints(9, self.num_tokens),
            "kv_lens": kv_lens,
            "block_tables": ints(77, batch, self.max_pages),
            "uniform": torch.rand(batch, generator=g),
            "draws": torch.rand(batch, wide, generator=g)[:, :steps],
            "stop_tokens": stop_tokens,
            "num_done": num_done,
            "log_tokens": ints(_VOCAB, batch, wide)[:, :steps],
            "log_logprobs": torch.rand(batch, wide, generator=g)[:, :steps],
            "ended": torch.zeros(batch, dtype=torch.int32),
            "page_size": self.page_size,
        }


def _work(inputs: Inputs) -> tuple[int, int]:
    # 14 numbers of every row are read or written, and its stop tokens read.
    return 14 * 4 * len(inputs["chosen"]) + num_bytes(inputs["stop_tokens"]), 0


_CASES = {
    "plain": _Sizes(),
    "mixed": _Sizes(batch=29, num_tokens=40, mixed=True),
    "strided": _Sizes(batch=9, num_tokens=9, mixed=True, strided=True),
    "one-row": _Sizes(batch=1, num_tokens=1),
    "one-step": _Sizes(max_steps=1),
    "no-stops": _Sizes(num_stops=0, mixed=True),
    "pages-of-one": _Sizes(page_size=1, max_pages=7),
    "empty": _Sizes(batch=0, num_tokens=0),
}


def cases() -> Iterator[OpCase]:
    """Every case of advance_step."""
    for name, sizes in _CASES.items():
        yield OpCase("advance_step", name, sizes.make, _work)
