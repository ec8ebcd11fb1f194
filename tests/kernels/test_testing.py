"""The cases themselves: what other tests and benchmarks rely on."""

import pytest
import torch

from fssa_kernels.testing import OPS, cases


@pytest.mark.parametrize("op", OPS)
def test_names_are_unique_and_an_empty_and_a_one_row_case_exist(op):
    names = [case.name for case in cases(op)]
    assert len(set(names)) == len(names)
    first = {
        "expand_modulation": "z",
        "paged_attention": "q",
        "rope_kv_write": "q",
        "take_rows": "index",
        "sample": "logits",
        "advance_step": "chosen",
    }.get(op, "x")
    rows = [len(case.inputs(torch.float32)[first]) for case in cases(op)]
    assert 0 in rows
    assert 1 in rows or op == "paged_attention"  # there a request of one row counts
    assert max(rows) > 1


@pytest.mark.parametrize("op", OPS)
def test_inputs_repeat_with_the_seed(op):
    case = cases(op)[0]
    one, same, other = (case.inputs(torch.float32, seed=seed) for seed in (1, 1, 2))
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(), same[name].nan_to_num())
            assert value.stride() == same[name].stride()
    assert any(
        isinstance(value, torch.Tensor) and not torch.equal(value, other[name])
        for name, value in one.items()
    )


def case_of(op, name):
    return next(case for case in cases(op) if case.name == name)


def test_bytes_and_flops_counted_by_hand():
    case = case_of("modulated_linear", "gated-one-by-one")
    inputs = case.inputs(torch.float32)
    inputs["slots"] = torch.tensor([0, 2], dtype=torch.int32)
    # x 2, W 1, y 2, A 1, B 1 and the rows of two users: nine numbers of four bytes.
    assert case.bytes(inputs) == 9 * 4
    # For each of two tokens W x, A x and B u at two each, and one gate.
    assert case.flops(inputs) == 2 * 7

    case = case_of("paged_attention", "window-of-one")
    inputs = case.inputs(torch.bfloat16)
    # Three queries of 6 heads of 8 in and out; each sees one key of 2 heads of 8 and its value.
    assert case.bytes(inputs) == 2 * (2 * 3 * 48 + 2 * 3 * 16)
    assert case.flops(inputs) == 4 * 3 * 48


def test_unknown_op():
    with pytest.raises(ValueError, match=r"op: expected one of modulated_linear.*'gemm'"):
        cases("gemm")
