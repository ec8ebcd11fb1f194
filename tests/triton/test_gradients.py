"""The kernels of the gradients, against the same formulas in fp64 and in the same precision."""

import pytest
import torch

from fssa_kernels.gpu.segments import Segments, sum_by_slot
from fssa_kernels.ops.modulated_linear.gradient import OP_BWD as LINEAR_BWD
from fssa_kernels.ops.residual_film_rms_norm.gradient import OP_BWD as NORM_BWD
from fssa_kernels.testing import cases
from tests.kernels.accuracy import (
    check_gradients,
    linear_gradient_inputs,
    make,
    same_bits,
)

LINEARS = [c for c in cases("modulated_linear") if not c.name.startswith("factors")]
NORMS = [c for c in cases("residual_film_rms_norm") if c.differentiable]
DTYPES = [torch.float32, torch.bfloat16]


def norm_inputs(inputs):
    g = torch.Generator().manual_seed(1)
    dtype, shape = inputs["x"].dtype, inputs["x"].shape
    dnormed, dh, h = (torch.randn(shape, generator=g).to(dtype) for _ in range(3))
    names = ("x", "residual", "weight", "rows", "slots")
    tensors = [inputs.get(name) for name in names]
    options = [inputs["eps"], inputs["weight_offset"]]
    return [dnormed, dh, h, *tensors, *options, [True, True, tensors[3] is not None]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LINEARS, ids=str)
def test_linear(case, dtype):
    check_gradients(LINEAR_BWD, linear_gradient_inputs(case.inputs(dtype)), "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["static", "gated", "core"])
def test_linear_over_several_tiles(family, dtype):
    inputs = make(
        "modulated_linear",
        dtype,
        family=family,
        num_tokens=150,
        in_features=100,
        splits=(70, 33),
        rank=18,
        num_users=7,
    )
    check_gradients(LINEAR_BWD, linear_gradient_inputs(inputs), "triton")


@pytest.mark.parametrize("needed", range(6))
@pytest.mark.parametrize("family", ["gated", "core"])
def test_each_gradient_alone_is_the_one_of_all_together(family, needed):
    inputs = make("modulated_linear", torch.float32, family=family, bias=True, splits=(20, 9))
    every = LINEAR_BWD(*linear_gradient_inputs(inputs), "triton")
    needs = [index == needed for index in range(6)]
    alone = LINEAR_BWD(*linear_gradient_inputs(inputs, needs), "triton")
    assert same_bits(alone, [every[needed]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_norm(case, dtype):
    check_gradients(NORM_BWD, norm_inputs(case.inputs(dtype)), "triton")


def test_sums_of_users_leave_out_slots_that_are_nobody_s():
    slots = torch.tensor([3, -1, 0, 7, 3, 2, 3], dtype=torch.int32)
    values = torch.randn(7, 5)
    out = torch.full((5, 5), float("nan"))
    sum_by_slot(values, Segments.of(slots, 5), out)
    expected = torch.stack([values[slots == user].sum(0) for user in range(5)])
    torch.testing.assert_close(out, expected)
