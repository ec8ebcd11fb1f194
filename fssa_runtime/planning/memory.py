"""What lies in a machine's memory: weights, users, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError
from .shapes import ModelSize

# The table gets at most this share of what the weights leave, keys and values the rest.
TABLE_SHARE = 0.5


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each tenant of the memory.

    Attributes:
        buffers: of a step's activations and logits, estimated from the shape.
        slots: users in the table, its row for nobody not counted.
        max_slots: users it could have within its share.
        num_pages: of keys and values, ``page_size`` tokens each.
    """

    total: int
    weights: int
    factors: int
    buffers: int
    row_bytes: int
    slots: int
    max_slots: int
    kv_token_bytes: int
    page_size: int
    num_pages: int

    @property
    def table(self) -> int:
        return (self.slots + 1) * self.row_bytes

    @property
    def kv(self) -> int:
        return self.num_pages * self.page_size * self.kv_token_bytes

    @property
    def kv_tokens(self) -> int:
        return self.num_pages * self.page_size


def plan_memory(
    model: ModelSize,
    memory_bytes: float,
    *,
    num_users: int,
    max_streams: int,
    max_tokens: int,
    page_size: int,
    slots: int | None = None,
) -> MemoryPlan:
    """Divide a memory: the model, then as many users as there are or fit, then keys and values.

    ``slots`` overrides the number of users in the table.

    Raises:
        InputError: no page size, the model does not fit, too few slots for the streams of a step,
            or nothing is left for keys and values.
    """
    if page_size < 1:
        raise InputError(f"page size: expected at least 1 token, got {page_size}")
    total = int(memory_bytes)
    # Hidden states of a layer (residual, normed, q k v, attended), gate and up, and fp32 logits.
    buffers = 2 * max_tokens * (6 * model.hidden_size + 2 * model.intermediate_size)
    buffers += 4 * max_streams * model.vocab_size
    left = total - model.weight_bytes - model.factor_bytes - buffers
    if left <= 0:
        raise InputError(
            f"{model.name} does not fit: weights {_gb(model.weight_bytes)}, shared factors "
            f"{_gb(model.factor_bytes)} and buffers {_gb(buffers)} in a memory of {_gb(total)}"
        )
    max_slots = int(left * TABLE_SHARE / model.row_bytes) - 1
    wanted = min(num_users, max_slots) if slots is None else slots
    if wanted < min(max_streams, num_users):
        raise InputError(
            f"the table has room for {max(wanted, 0)} users, fewer than the {max_streams} streams "
            "of a step; expected fewer streams, a smaller rank or more memory"
        )
    page_bytes = page_size * model.kv_token_bytes
    num_pages = (left - (wanted + 1) * model.row_bytes) // page_bytes
    if num_pages < 1:
        raise InputError(
            f"no memory is left for keys and values beside {model.name} and {wanted} users: "
            f"{_gb(left)} after the model, {_gb(wanted * model.row_bytes)} for the table"
        )
    return MemoryPlan(
        total=total,
        weights=model.weight_bytes,
        factors=model.factor_bytes,
        buffers=buffers,
        row_bytes=model.row_bytes,
        slots=wanted,
        max_slots=max_slots,
        kv_token_bytes=model.kv_token_bytes,
        page_size=page_size,
        num_pages=num_pages,
    )


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
