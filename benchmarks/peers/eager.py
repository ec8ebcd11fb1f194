"""Greedy decoding with a transformers model, one forward a step: what two of the workers share.

``generate`` is not used: its time cannot be split into prefill and steps, and its bookkeeping of
about a millisecond a step is not the model's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers import precision, worker


def load(model: Path, threads: int) -> tuple[Any, str]:
    """The checkpoint with PyTorch's attention in the precision that is fastest here, and its name;
    the thread count is set."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    dtype = precision.fastest()
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), attn_implementation="sdpa", local_files_only=True
    )
    return loaded.eval(), dtype


def decode(
    forward: Callable[..., Any],
    make_cache: Callable[[int, int], Any],
    batch: int,
    prompt: list[int],
    new_tokens: int,
) -> worker.Decoded:
    """Time the steps after the prompts of all rows were read.

    ``forward`` takes ``input_ids`` and ``past_key_values`` and returns an output with ``logits``;
    ``make_cache`` takes the number of rows and of tokens each will hold.
    """
    import torch

    with torch.inference_mode():
        cache = make_cache(batch, len(prompt) + new_tokens)
        picked = _pick(forward(torch.tensor([prompt] * batch), cache))
        rows = [picked]
        begin = time.perf_counter()
        for _ in range(new_tokens):
            picked = _pick(forward(picked, cache))
            rows.append(picked)
        seconds = time.perf_counter() - begin
        first = torch.cat(rows[: worker.NUM_FIRST_TOKENS], dim=1).tolist()
    return worker.Decoded(seconds, batch * new_tokens, first)


def prefill(
    forward: Callable[..., Any], make_cache: Callable[[int, int], Any], prompt: list[int]
) -> worker.Prefilled:
    import torch

    with torch.inference_mode():
        cache = make_cache(1, len(prompt))
        begin = time.perf_counter()
        _pick(forward(torch.tensor([prompt]), cache))
        return worker.Prefilled(time.perf_counter() - begin, len(prompt))


def _pick(output: Any) -> Any:
    """The greedy token of each row, ``[B, 1]``."""
    return output.logits[:, -1].argmax(dim=-1, keepdim=True)
