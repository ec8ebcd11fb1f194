"""Every op, case and dtype in Triton's interpreter, against fp64 and PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fssa_kernels import explain
from fssa_kernels.testing import cases
from tests.kernels.accuracy import any_inputs, check_as_good_as_torch

OPS = (
    "modulated_linear",
    "residual_film_rms_norm",
    "rope_kv_write",
    "paged_attention",
    "expand_modulation",
    "take_rows",
    "sample",
)
CASES = [case for op in OPS for case in cases(op)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_good_as_torch_in_the_same_dtype(case, dtype):
    inputs = case.inputs(dtype)
    if case.op == "rope_kv_write":  # what nobody stores stays as it was
        inputs["k_cache"].fill_(float("nan"))
        inputs["v_cache"].fill_(float("nan"))
    verdict = next(v for v in explain(case.op, **inputs) if v.backend == "triton")
    assert verdict.can, verdict
    check_as_good_as_torch(case.op, inputs, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_any_sizes_and_strides_are_as_good_as_torch(op, dtype, data, seed):
    check_as_good_as_torch(op, any_inputs(data, op, dtype, seed), "triton")
