"""Types of the native module (csrc/bindings.cpp)."""

from collections.abc import Sequence

def instruction_set() -> str: ...
def modulated_linear(
    y: int,
    x: int,
    x_stride: int,
    x_dtype: int,
    weight: int,
    weight_stride: int,
    bias: int,
    lora_a: int,
    lora_a_user_stride: int,
    lora_a_stride: int,
    lora_a_dtype: int,
    lora_b: int,
    lora_b_user_stride: int,
    lora_b_stride: int,
    lora_b_dtype: int,
    rows: int,
    rows_stride: int,
    rows_dtype: int,
    slots: int,
    num_tokens: int,
    in_features: int,
    rank: int,
    num_users: int,
    splits: Sequence[int],
    family: int,
    epilogue: int,
    num_threads: int,
) -> None: ...
