"""Choosing tokens on the CPU in C++ (csrc/cpu/sample.h)."""

import torch
from torch import Tensor

from fssa_kernels.native import DTYPE_CODES, NATIVE, empty, launch, rows_of, unsupported


def cannot_native(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    forced: Tensor,
) -> str | None:
    """Why the native kernel is unable to serve these inputs, or None."""
    return unsupported(
        logits=logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        uniform=uniform,
        forced=forced,
    )


def sample_native(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    forced: Tensor,
) -> tuple[Tensor, Tensor]:
    """The public function on inputs that `cannot_native` accepts; ValueError for a bad index."""
    assert NATIVE is not None
    batch, vocab_size = logits.shape
    tokens = empty(logits, (batch,), torch.int32)
    logprobs = empty(logits, (batch,), torch.float32)
    chunks = -(-vocab_size // NATIVE.SAMPLE_CHUNK)
    stats = empty(logits, (batch, chunks, 2), torch.float32)
    weights = empty(logits, (torch.get_num_threads(), vocab_size), torch.float32)
    kept = empty(logits, (torch.get_num_threads(), vocab_size), torch.int32)
    call = NATIVE.sample(
        rows_of(logits),
        tokens.data_ptr(),
        logprobs.data_ptr(),
        logits.data_ptr(),
        logits.stride(0),
        DTYPE_CODES[logits.dtype],
        vocab_size,
        temperature.data_ptr(),
        top_k.data_ptr(),
        top_p.data_ptr(),
        min_p.data_ptr(),
        uniform.data_ptr(),
        forced.data_ptr(),
        stats.data_ptr(),
        weights.data_ptr(),
        kept.data_ptr(),
    )
    launch("sample", call, logits, temperature, top_k, top_p, min_p, uniform, forced)
    return tokens, logprobs
