import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fssa_kernels import checks, modulated_linear
from fssa_kernels.ops.modulated_linear.cases import _Sizes
from fssa_kernels.testing import cases
from tests.kernels.kernel_oracles import modulated_linear_oracle

CASES = cases("modulated_linear")
# Shapes differ in what they exercise, dtypes in rounding only: fp32 and bf16 see every case too.
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def by_name(name):
    return next(case for case in CASES if case.name == name)


def with_grad(case, dtype, names=None):
    inputs = case.inputs(dtype)
    for name in case.differentiable if names is None else names:
        inputs[name].requires_grad_()
    return inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_matches_merged_weights(case, dtype):
    inputs = case.inputs(dtype)
    y = case.run(inputs, backend="reference")
    expected = modulated_linear_oracle(**inputs)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    torch.testing.assert_close(y.double(), expected, **case.tolerance(dtype))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(["none", "static", "gated", "core", "factors"]),
    num_tokens=st.integers(0, 9),
    in_features=st.integers(1, 40),
    splits=st.lists(st.integers(1, 20), min_size=1, max_size=4).map(tuple),
    rank=st.integers(1, 9),
    num_users=st.integers(1, 5),
    strided=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_sizes_match_merged_weights(seed, **sizes):
    inputs = _Sizes(**sizes).make(torch.Generator().manual_seed(seed), torch.float64)
    y = modulated_linear(**inputs)
    torch.testing.assert_close(y, modulated_linear_oracle(**inputs), rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case):
    inputs = with_grad(case, torch.float64)
    names = case.differentiable

    def call(*tensors):
        return modulated_linear(**{**inputs, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(call, [inputs[name] for name in names], fast_mode=True)


@pytest.mark.parametrize("name", ["gated-fp32-side", "core-fp32-side", "factors-stacked"])
def test_mixed_precision_gradients_have_their_inputs_dtype(name):
    """bf16 activations and weights, fp32 low-rank side: the training path."""
    case = by_name(name)
    inputs = with_grad(case, torch.bfloat16)
    y = modulated_linear(**inputs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = [inputs[n] for n in case.differentiable]
    got = torch.autograd.grad(y, wanted, dy)
    expected = torch.autograd.grad(modulated_linear_oracle(**inputs), wanted, dy.double())
    for name, grad, right in zip(case.differentiable, got, expected, strict=True):
        assert grad.dtype == inputs[name].dtype
        # fp32 sides see bf16 rounding in dy and x only, which both computations share.
        bound = 1e-5 if grad.dtype == torch.float32 else 2**-7
        assert (grad - right).abs().max() <= bound * right.abs().max(), name


def test_only_needed_gradients_are_computed_and_kept():
    case = by_name("gated-stacked")
    inputs = with_grad(case, torch.float32, names=["rows"])
    y = modulated_linear(**inputs)
    kept = {t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None}
    assert inputs["weight"].data_ptr() not in kept  # only dx reads W
    y.sum().backward()
    assert inputs["rows"].grad is not None
    assert all(inputs[n].grad is None for n in case.differentiable if n != "rows")

    inputs = with_grad(case, torch.float32, names=["x"])
    y = modulated_linear(**inputs)
    kept = {t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None}
    assert inputs["weight"].data_ptr() in kept
    assert inputs["x"].data_ptr() not in kept  # dx does not read x


@pytest.mark.parametrize("name", ["gated-silu", "gated-gelu", "core-silu"])
def test_epilogue_agrees_with_and_without_gradients(name):
    case = by_name(name)
    inputs = case.inputs(torch.float32)
    without = modulated_linear(**inputs, backend="reference")
    inputs["x"].requires_grad_()
    recorded = modulated_linear(**inputs, backend="reference")
    assert recorded.requires_grad
    torch.testing.assert_close(recorded.detach(), without, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gated-stacked", "core-stacked-strided", "factors-stacked"])
def test_slot_zero_is_exactly_the_base(name, dtype):
    inputs = by_name(name).inputs(dtype)
    inputs["slots"].zero_()
    base = modulated_linear(
        inputs["x"], inputs["weight"], inputs["bias"], splits=inputs["splits"], backend="reference"
    )
    assert torch.equal(modulated_linear(**inputs, backend="reference"), base)


@pytest.mark.parametrize("name", ["gated", "core", "factors"])
def test_unused_table_rows_never_leak(name):
    inputs = by_name(name).inputs(torch.float32)
    inputs["slots"] = torch.tensor([0, 1, 3, 1, 0], dtype=torch.int32)
    clean = modulated_linear(**inputs, backend="reference")
    table = inputs["lora_a"] if name == "factors" else inputs["rows"]
    table[2] = float("nan")
    assert torch.equal(modulated_linear(**inputs, backend="reference"), clean)


@pytest.mark.parametrize("name", ["gated", "core", "factors", "gated-silu"])
def test_other_rows_never_leak(name):
    inputs = by_name(name).inputs(torch.float32)
    clean = modulated_linear(**inputs, backend="reference")
    inputs["x"][1] = float("nan")
    y = modulated_linear(**inputs, backend="reference")
    assert y[1].isnan().all()
    others = [0, 2, 3, 4]
    torch.testing.assert_close(y[others], clean[others], rtol=0, atol=0)


def test_slots_are_not_read_where_the_user_does_not_matter():
    inputs = by_name("static").inputs(torch.float32)
    y = modulated_linear(**inputs)
    assert torch.equal(modulated_linear(**{**inputs, "slots": None}), y)


BAD = {
    "x of rank 3": (dict(x=torch.zeros(1, 5, 37)), ValueError, r"x: expected shape \[T, K\]"),
    "x not a tensor": (dict(x=[1.0]), TypeError, "x: expected a tensor, got list"),
    "x of integers": (dict(x=torch.zeros(5, 37, dtype=torch.int32)), TypeError, "x: .*int32"),
    "weight width": (dict(weight=torch.zeros(28, 36)), ValueError, r"weight: .*37.*\(28, 36\)"),
    "weight dtype": (dict(weight=torch.zeros(28, 37).double()), TypeError, "weight: .*float64"),
    "bias size": (dict(bias=torch.zeros(3)), ValueError, r"bias: .*\(28,\).*\(3,\)"),
    "lora_a rows": (dict(lora_a=torch.zeros(8, 37)), ValueError, r"lora_a: .*\(9, 37\)"),
    "lora_a missing": (dict(lora_a=None), TypeError, "lora_a: expected a tensor, got NoneType"),
    "lora_b missing": (dict(lora_b=None), TypeError, "lora_b: expected a tensor"),
    "lora_b dtype": (dict(lora_b=torch.zeros(28, 3).half()), TypeError, "lora_b: .*float16"),
    "rank zero": (dict(lora_b=torch.zeros(28, 0)), ValueError, "lora_b: .*at least 1"),
    "rows missing": (dict(rows=None), TypeError, "rows: expected a tensor"),
    "rows width": (dict(rows=torch.zeros(4, 8)), ValueError, r"rows: .*\(4, 9\).*\(4, 8\)"),
    "rows rank": (dict(rows=torch.zeros(4, 3, 3)), ValueError, r"rows: .*\[U, S\*R\]"),
    "slots missing": (dict(slots=None), TypeError, "slots: expected a tensor"),
    "slots length": (dict(slots=torch.zeros(4, dtype=torch.int32)), ValueError, "slots: .*5"),
    "slots dtype": (dict(slots=torch.zeros(5, dtype=torch.int64)), TypeError, "slots: .*int32"),
    "slot too large": (
        dict(slots=torch.tensor([0, 1, 4, 0, 0], dtype=torch.int32)),
        ValueError,
        r"slots: expected values in \[0, 4\), got .*4",
    ),
    "slot negative": (
        dict(slots=torch.tensor([0, -1, 0, 0, 0], dtype=torch.int32)),
        ValueError,
        r"slots: expected values in \[0, 4\), got .*-1",
    ),
    "splits sum": (dict(splits=[17, 5, 5]), ValueError, "splits: .*sum to N = 28"),
    "splits empty": (dict(splits=[]), ValueError, "splits: .*sum to N = 28"),
    "splits zero": (dict(splits=[28, 0]), ValueError, "splits: expected positive sizes"),
    "family": (dict(family="lora"), ValueError, "family: expected one of none.*'lora'"),
    "epilogue": (dict(epilogue="relu"), ValueError, "epilogue: expected one of none.*'relu'"),
    "epilogue splits": (dict(epilogue="silu_mul"), ValueError, "splits: expected two equal sizes"),
    "backend": (dict(backend="cublas"), ValueError, "backend: expected one of auto.*'cublas'"),
    "lora with none": (dict(family="none"), ValueError, "lora_a: expected None for family 'none'"),
    "rows with static": (dict(family="static"), ValueError, "rows: expected None for family"),
}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_names_argument_expected_and_got(change, error, message, backend):
    inputs = by_name("gated-stacked").inputs(torch.float32)
    with pytest.raises(error, match=message):
        modulated_linear(**{**inputs, "backend": backend, **change})


def test_factors_slot_out_of_range():
    inputs = by_name("factors").inputs(torch.float32)
    inputs["slots"][2] = 4
    for backend in ("reference", "auto"):
        with pytest.raises(ValueError, match=r"slots: expected values in \[0, 4\), got"):
            modulated_linear(**inputs, backend=backend)


@pytest.mark.parametrize("name", ["gated-stacked", "core", "factors"])
@pytest.mark.parametrize("slot", [-1, 4, 2**31 - 1])
def test_where_slots_cannot_be_checked_one_out_of_range_is_a_row_of_nan(name, slot, monkeypatch):
    """As on a GPU, which torch's own error would make useless for the whole process."""
    good, bad = (with_grad(by_name(name), torch.float32) for _ in range(2))
    expected = modulated_linear(**good, backend="reference")
    monkeypatch.setattr(checks, "can_check", lambda tensor: False)
    bad["slots"][2] = slot
    y = modulated_linear(**bad, backend="reference")
    others = [0, 1, 3, 4]
    assert y[2].isnan().all()
    torch.testing.assert_close(y[others], expected[others])
    if name != "factors":
        y[others].sum().backward()
        expected[others].sum().backward()
        torch.testing.assert_close(bad["rows"].grad, good["rows"].grad)


def test_where_slots_cannot_be_checked_a_table_may_be_empty(monkeypatch):
    monkeypatch.setattr(checks, "can_check", lambda tensor: False)
    inputs = by_name("gated").inputs(torch.float32)
    inputs["rows"] = inputs["rows"][:0]
    assert modulated_linear(**inputs, backend="reference").isnan().all()
