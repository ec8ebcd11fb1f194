"""Going on to the next step on the CPU in C++ (csrc/cpu/advance_step.h)."""

from typing import Any

from torch import Tensor

from fssa_kernels.native import NATIVE, launch, rows_of, unsupported

_TENSORS = (
    "chosen",
    "logprobs",
    "tokens",
    "positions",
    "kv_slots",
    "kv_lens",
    "block_tables",
    "uniform",
    "draws",
    "stop_tokens",
    "num_done",
    "log_tokens",
    "log_logprobs",
    "ended",
)


def cannot_native(*inputs: Any) -> str | None:
    """Why the native kernel is unable to serve these inputs, or None."""
    *tensors, _page_size = inputs
    return unsupported(**dict(zip(_TENSORS, tensors, strict=True)))


def advance_step_native(
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
    page_size: int,
) -> None:
    """The public function on inputs that `cannot_native` accepts."""
    assert NATIVE is not None
    call = NATIVE.advance_step(
        rows_of(kv_lens),
        chosen.data_ptr(),
        logprobs.data_ptr(),
        tokens.data_ptr(),
        positions.data_ptr(),
        kv_slots.data_ptr(),
        kv_lens.data_ptr(),
        (block_tables.data_ptr(), block_tables.stride(0), block_tables.shape[1]),
        uniform.data_ptr(),
        (draws.data_ptr(), draws.stride(0), draws.shape[1]),
        (stop_tokens.data_ptr(), stop_tokens.stride(0), stop_tokens.shape[1]),
        num_done.data_ptr(),
        (log_tokens.data_ptr(), log_tokens.stride(0), log_tokens.shape[1]),
        (log_logprobs.data_ptr(), log_logprobs.stride(0), log_logprobs.shape[1]),
        ended.data_ptr(),
        page_size,
    )
    # `chosen`, which a step may have computed, is copied here and no index into any memory.
    static = (tokens, positions, kv_slots, kv_lens, block_tables, uniform, draws, stop_tokens)
    launch("advance_step", call, *static, num_done, log_tokens, log_logprobs, ended)
