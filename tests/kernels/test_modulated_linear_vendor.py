"""The modulated linear by products in bf16, forward and backward, against fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fssa_kernels import explain, modulated_linear
from fssa_kernels.ops.modulated_linear.gradient import OP_BWD
from fssa_kernels.ops.modulated_linear.vendor_impl import FROM_ROWS
from fssa_kernels.testing import cases
from tests.kernels.accuracy import (
    any_inputs,
    exact,
    exact_gradients,
    linear_gradient_inputs,
    make,
)
from tests.kernels.kernel_oracles import modulated_linear_oracle

SHARED = ("static", "gated", "core")
CASES = [c for c in cases("modulated_linear") if c.name.startswith(SHARED)]
# Of the largest value: x A^T, u', the term, the base product and their sum are rounded to bf16 one
# after another, each by 2**-9 of its own size; so is every product of the gradients.
ROUNDING = 2**-7


def check(got, right, rounding=ROUNDING):
    assert got.shape == right.shape
    if got.numel():
        assert (got - right).abs().max() <= rounding * right.abs().max().clamp(min=1)


def check_values(inputs):
    y = modulated_linear(**inputs, backend="vendor")
    assert y.dtype == torch.bfloat16
    (right,) = exact("modulated_linear", inputs)
    if inputs["epilogue"] == "none" or not right.numel():
        check(y, right)
        return
    # An epilogue multiplies two such values, act(gate) up: each as wrong as its own largest allows,
    # times the other's size; no activation is steeper than 1.2 or larger than what it is of.
    (factors,) = exact("modulated_linear", {**inputs, "epilogue": "none"})
    gate, up = factors.chunk(2, dim=1)
    wrong = [ROUNDING * half.abs().max().clamp(min=1) for half in (gate, up)]
    both = 1.2 * wrong[0] * up.abs() + wrong[1] * gate.abs() + 1.2 * wrong[0] * wrong[1]
    assert ((y - right).abs() <= both + 2**-8 * right.abs()).all()


def test_values_where_the_largest_factors_are_in_different_rows():
    sizes = {"num_tokens": 5, "in_features": 15, "splits": (1, 1), "rank": 15, "num_users": 2}
    sizes |= {"family": "core", "bias": True, "epilogue": "silu_mul"}
    check_values(make("modulated_linear", torch.bfloat16, seed=125, **sizes))


def check_gradients(inputs):
    for got, right in zip(OP_BWD(*inputs, "vendor"), exact_gradients(OP_BWD, inputs), strict=True):
        check(got, right)


def verdict(inputs, backend="vendor"):
    return next(v for v in explain(modulated_linear, **inputs) if v.backend == backend)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case):
    check_values(case.inputs(torch.bfloat16))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_values_of_any_sizes(data, seed):
    inputs = any_inputs(data, "modulated_linear", torch.bfloat16, seed)
    if inputs["family"] in SHARED:
        check_values(inputs)
    else:
        assert not verdict(inputs).can


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case):
    check_gradients(linear_gradient_inputs(case.inputs(torch.bfloat16)))


@pytest.mark.parametrize("needed", range(6))
@pytest.mark.parametrize("family", SHARED)
def test_each_gradient_alone(family, needed):
    inputs = make("modulated_linear", torch.bfloat16, family=family, bias=True, splits=(20, 9))
    needs = [index == needed for index in range(6)]
    check_gradients(linear_gradient_inputs(inputs, needs))


@pytest.mark.parametrize("family", SHARED)
def test_training_takes_it_for_many_rows(family):
    """Values and gradients through the public function, bf16 activations and fp32 sides."""
    inputs = make(
        "modulated_linear",
        torch.bfloat16,
        family=family,
        num_tokens=FROM_ROWS,
        splits=(70, 33),
        fp32_side=True,
    )
    assert verdict(inputs).chosen
    names = [n for n in ("x", "lora_a", "lora_b", "rows") if n in inputs]
    leaves = [inputs[n].requires_grad_() for n in names]
    y = modulated_linear(**inputs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = torch.autograd.grad(y, leaves, dy)
    expected = torch.autograd.grad(modulated_linear_oracle(**inputs), leaves, dy.double())
    for name, ours, right in zip(names, got, expected, strict=True):
        assert ours.dtype == inputs[name].dtype
        check(ours, right)
    fewer = make("modulated_linear", torch.bfloat16, family=family, num_tokens=FROM_ROWS - 1)
    assert verdict(fewer, "reference").chosen


@pytest.mark.parametrize("family", SHARED[1:])
def test_slot_zero_is_exactly_the_base(family):
    inputs = make("modulated_linear", torch.bfloat16, family=family, splits=(20, 9))
    inputs["slots"].zero_()
    base = modulated_linear(
        inputs["x"], inputs["weight"], splits=inputs["splits"], backend="reference"
    )
    assert torch.equal(modulated_linear(**inputs, backend="vendor"), base)


def test_what_it_is_not_for_is_said():
    with pytest.raises(ValueError, match="float32 on cpu"):
        modulated_linear(
            **make("modulated_linear", torch.float32, family="gated"), backend="vendor"
        )
    packed = next(c for c in cases("modulated_linear") if c.name == "gated").prepare(
        make("modulated_linear", torch.bfloat16, family="gated"), "native"
    )
    assert "packed" in verdict(packed).reason
