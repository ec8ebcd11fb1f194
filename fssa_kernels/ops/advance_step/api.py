"""From one decode step to the next: what was chosen becomes what is computed."""

from typing import Any

import torch
from torch import Tensor

from fssa_kernels.checks import INDEX_DTYPES, bad_value, check_rank, check_tensor
from fssa_kernels.dispatch import Backend
from fssa_kernels.ops.advance_step.native_impl import advance_step_native, cannot_native
from fssa_kernels.ops.advance_step.reference import advance_step_ref
from fssa_kernels.registration import Op

_NAME = "advance_step"


def advance_step(
    chosen: Tensor,
    logprobs: Tensor,
    tokens: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    kv_lens: Tensor,
    block_tables: Tensor,
    uniform: Tensor,
    draws: Tensor,
    stop_tokens: Tensor,
    num_done: Tensor,
    log_tokens: Tensor,
    log_logprobs: Tensor,
    ended: Tensor,
    *,
    page_size: int,
    backend: str = "auto",
) -> None:
    """Make a decode step's inputs those of the step after it, in place, and log what was chosen.

    A row b is a request whose one token stands at row b of what the model reads. With
    i = num_done[b] and p = kv_lens[b], where 0 <= i < N and p > 0 (other rows stay as they are):

        log_tokens[b, i], log_logprobs[b, i] = chosen[b], logprobs[b]
        num_done[b] = i + 1
        tokens[b], positions[b], kv_lens[b] = chosen[b], p, p + 1
        kv_slots[b] = block_tables[b, p // P] * P + p % P, -1 past the table
        uniform[b] = draws[b, i + 1], the last one's at the end
        ended[b] = 1 if chosen[b] is one of stop_tokens[b], logprobs[b] is NaN, i + 1 = N or p is
                   past the table, otherwise 0

    Arguments:
        chosen: [B] int32, logprobs: [B] fp32: what `sample` returned.
        tokens, positions, kv_slots: [T] int32, T >= B, what a step reads of each token; written.
        kv_lens: [B] int32, cached tokens, the newest included; written.
        block_tables: [B,max_pages] int32, max_pages >= 1: pages of each request, the next token's
            too.
        uniform: [B] fp32, written; draws: [B,N] fp32, N >= 1: that of each step, the first one's
            first.
        stop_tokens: [B,S] int32, -1 for none.
        num_done: [B] int32, steps a row has gone; log_tokens: [B,N] int32; log_logprobs: [B,N]
            fp32; ended: [B] int32; all written.
        page_size: P, tokens of a page.
        backend: "auto", "native" or "reference".

    Raises TypeError for a non-tensor or a wrong dtype; ValueError for a wrong shape, device or
    backend, and for a page size below 1.
    """
    _OP(
        *_prepare(
            chosen,
            logprobs,
            tokens,
            positions,
            kv_slots,
            kv_lens,
            block_tables,
            uniform,
            draws,
            stop_tokens,
            num_done,
            log_tokens,
            log_logprobs,
            ended,
            page_size=page_size,
            backend=backend,
        )
    )


def _prepare(
    chosen: Tensor,
    logprobs: Tensor,
    tokens: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    kv_lens: Tensor,
    block_tables: Tensor,
    uniform: Tensor,
    draws: Tensor,
    stop_tokens: Tensor,
    num_done: Tensor,
    log_tokens: Tensor,
    log_logprobs: Tensor,
    ended: Tensor,
    *,
    page_size: int,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """The operator's positional arguments, checked."""
    check_rank(_NAME, "chosen", chosen, "[B]", 1)
    check_rank(_NAME, "tokens", tokens, "[T]", 1)
    check_rank(_NAME, "block_tables", block_tables, "[B, max_pages]", 2)
    check_rank(_NAME, "draws", draws, "[B, N]", 2)
    check_rank(_NAME, "stop_tokens", stop_tokens, "[B, S]", 2)
    (batch,), (num_tokens,) = chosen.shape, tokens.shape
    if num_tokens < batch:
        bad_value(_NAME, "tokens", f"at least the {batch} of the batch", f"{num_tokens}")
    max_steps = draws.shape[1]
    for name, value in (("block_tables", block_tables), ("draws", draws)):
        if value.shape[1] == 0:
            bad_value(_NAME, name, "at least one column", f"shape {tuple(value.shape)}")
    if page_size < 1:
        bad_value(_NAME, "page_size", "at least 1", repr(page_size))
    fp32 = (torch.float32,)
    for name, value, shape, dtypes in (
        ("chosen", chosen, (batch,), INDEX_DTYPES),
        ("logprobs", logprobs, (batch,), fp32),
        ("tokens", tokens, (num_tokens,), INDEX_DTYPES),
        ("positions", positions, (num_tokens,), INDEX_DTYPES),
        ("kv_slots", kv_slots, (num_tokens,), INDEX_DTYPES),
        ("kv_lens", kv_lens, (batch,), INDEX_DTYPES),
        ("block_tables", block_tables, (batch, block_tables.shape[1]), INDEX_DTYPES),
        ("uniform", uniform, (batch,), fp32),
        ("draws", draws, (batch, max_steps), fp32),
        ("stop_tokens", stop_tokens, (batch, stop_tokens.shape[1]), INDEX_DTYPES),
        ("num_done", num_done, (batch,), INDEX_DTYPES),
        ("log_tokens", log_tokens, (batch, max_steps), INDEX_DTYPES),
        ("log_logprobs", log_logprobs, (batch, max_steps), fp32),
        ("ended", ended, (batch,), INDEX_DTYPES),
    ):
        check_tensor(_NAME, name, value, shape, dtypes, chosen.device)
    chosen_now = (chosen, logprobs)
    inputs = (tokens, positions, kv_slots, kv_lens, block_tables, uniform, draws, stop_tokens)
    logged = (num_done, log_tokens, log_logprobs, ended)
    return *chosen_now, *inputs, *logged, page_size, backend


def _fake(*inputs: Any) -> None:
    return None


_OP = Op(
    _NAME,
    "(Tensor chosen, Tensor logprobs, Tensor(a!) tokens, Tensor(b!) positions, "
    "Tensor(c!) kv_slots, Tensor(d!) kv_lens, Tensor block_tables, Tensor(e!) uniform, "
    "Tensor draws, Tensor stop_tokens, Tensor(f!) num_done, Tensor(g!) log_tokens, "
    "Tensor(h!) log_logprobs, Tensor(i!) ended, int page_size, str backend) -> ()",
    prepare=_prepare,
    backends=(
        Backend("native", advance_step_native, cannot_native, records=True),
        Backend("reference", advance_step_ref),
    ),
    fake=_fake,
)
