"""PyTorch maths of going on to the next step."""

import torch
from torch import Tensor


def advance_step_ref(
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
    """Log what was chosen, say which rows end with it, and make the inputs of the next step."""
    max_steps, max_keys = draws.shape[1], block_tables.shape[1] * page_size
    goes_on = (kv_lens > 0) & (num_done >= 0) & (num_done < max_steps)
    row = torch.arange(len(chosen), device=chosen.device)
    step = num_done.clamp(0, max_steps - 1).long()
    position = kv_lens.long()
    is_last, is_full = step + 1 == max_steps, position >= max_keys
    is_stop = ((stop_tokens == chosen[:, None]) & (chosen >= 0)[:, None]).any(1)
    in_table = position.clamp(0, max_keys - 1)
    next_slot = block_tables[row, in_table // page_size] * page_size + in_table % page_size
    next_draw = draws[row, (step + 1).clamp(max=max_steps - 1)]

    log_tokens[row, step] = torch.where(goes_on, chosen, log_tokens[row, step])
    log_logprobs[row, step] = torch.where(goes_on, logprobs, log_logprobs[row, step])
    for buffer, value in (
        (num_done, step + 1),
        (ended, is_stop | is_last | is_full | logprobs.isnan()),
        (tokens, chosen),
        (positions, position),
        (kv_lens, position + 1),
        (uniform, next_draw),
        (kv_slots, torch.where(is_full, -1, next_slot)),
    ):
        first_rows = buffer[: len(chosen)]
        first_rows.copy_(torch.where(goes_on, value.to(buffer.dtype), first_rows))
