import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fssa_kernels import checks, residual_film_rms_norm
from fssa_kernels.ops.residual_film_rms_norm.cases import _Sizes
from fssa_kernels.testing import cases
from tests.kernels.kernel_oracles import film_oracle, rms_norm_oracle

CASES = cases("residual_film_rms_norm")
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# Half a unit in the last place, relative, and a little for the fp32 computation before rounding.
HALF_ULP = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1.01 * 2**-8}


def by_name(name):
    return next(case for case in CASES if case.name == name)


def check(inputs, dtype):
    normed, h = residual_film_rms_norm(**inputs)
    exact_h = film_oracle(inputs["x"], inputs["residual"], inputs.get("rows"), inputs.get("slots"))
    exact = rms_norm_oracle(h, inputs["weight"], inputs["eps"], inputs["weight_offset"])
    assert normed.dtype == h.dtype == dtype
    # Rounded once: a second rounding anywhere would exceed half a unit. h may cancel, so its
    # fp32 error is relative to what was added.
    torch.testing.assert_close(h.double(), exact_h, rtol=HALF_ULP[dtype], atol=1e-5)
    width = inputs["x"].shape[1]
    torch.testing.assert_close(normed[:, :width].double(), exact, rtol=HALF_ULP[dtype], atol=1e-12)
    if inputs.get("lora_a") is None:
        assert normed.shape[1] == width
        return
    s = normed[:, :width].double() @ inputs["lora_a"].double().t()
    if inputs.get("gates") is not None:
        s *= inputs["gates"].double()[inputs["slots"].long()]
    # The sum over channels is in fp32 and may cancel.
    torch.testing.assert_close(normed[:, width:].double(), s, rtol=HALF_ULP[dtype], atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle_and_rounds_once(case, dtype):
    check(case.inputs(dtype), dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(0, 9),
    num_channels=st.integers(1, 70),
    residual=st.booleans(),
    film=st.booleans(),
    num_users=st.integers(1, 5),
    weight_offset=st.sampled_from([0.0, 1.0]),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_sizes_match_the_oracle(seed, **sizes):
    check(_Sizes(**sizes).make(torch.Generator().manual_seed(seed), torch.float64), torch.float64)


@pytest.mark.parametrize("case", [c for c in CASES if c.differentiable], ids=str)
def test_gradients(case):
    inputs = case.inputs(torch.float64)
    for name in case.differentiable:
        inputs[name].requires_grad_()

    def call(*tensors):
        return residual_film_rms_norm(
            **{**inputs, **dict(zip(case.differentiable, tensors, strict=True))}
        )

    tensors = [inputs[name] for name in case.differentiable]
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


def test_the_next_linear_s_input_is_for_inference():
    inputs = by_name("shrink").inputs(torch.float32)
    inputs["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="lora_a: expected None where a gradient is wanted"):
        residual_film_rms_norm(**inputs)


@pytest.mark.parametrize("needed", ["x", "residual", "weight", "rows"])
def test_one_gradient_alone_is_the_same(needed):
    case = by_name("film")
    inputs = case.inputs(torch.float64)
    for name in case.differentiable:
        inputs[name].requires_grad_()
    all_together = torch.autograd.grad(
        sum(t.square().sum() for t in residual_film_rms_norm(**inputs)), inputs[needed]
    )[0]
    for name in case.differentiable:
        inputs[name].requires_grad_(name == needed)
    alone = torch.autograd.grad(
        sum(t.square().sum() for t in residual_film_rms_norm(**inputs)), inputs[needed]
    )[0]
    torch.testing.assert_close(alone, all_together, rtol=1e-12, atol=1e-12)


def test_bf16_gradients_have_their_inputs_dtype():
    case = by_name("film-fp32-side")
    inputs = case.inputs(torch.bfloat16)
    for name in case.differentiable:
        inputs[name].requires_grad_()
    normed, h = residual_film_rms_norm(**inputs)
    (normed.float().sum() + h.float().square().sum()).backward()
    for name in case.differentiable:
        assert inputs[name].grad.dtype == inputs[name].dtype
        assert inputs[name].grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slot_zero_is_exactly_no_film(dtype):
    inputs = by_name("film-strided").inputs(dtype)
    inputs["slots"].zero_()
    with_film = residual_film_rms_norm(**inputs)
    without = residual_film_rms_norm(**{**inputs, "rows": None, "slots": None})
    for got, expected in zip(with_film, without, strict=True):
        assert torch.equal(got, expected)


def test_nan_in_unused_rows_and_other_tokens_never_leaks():
    inputs = by_name("film").inputs(torch.float32)
    inputs["slots"] = torch.tensor([0, 1, 0, 1, 0], dtype=torch.int32)
    clean = residual_film_rms_norm(**inputs)
    inputs["rows"][2] = float("nan")
    inputs["x"][1] = float("nan")
    others = [0, 2, 3, 4]
    for got, expected in zip(residual_film_rms_norm(**inputs), clean, strict=True):
        assert got[1].isnan().all()
        assert torch.equal(got[others], expected[others])


@pytest.mark.parametrize("slot", [-1, 3])
def test_where_slots_cannot_be_checked_one_out_of_range_is_a_row_of_nan(slot, monkeypatch):
    good, bad = (by_name("film").inputs(torch.float32) for _ in range(2))
    for inputs in (good, bad):
        inputs["rows"].requires_grad_()
    expected = residual_film_rms_norm(**good, backend="reference")
    monkeypatch.setattr(checks, "can_check", lambda tensor: False)
    bad["slots"][2] = slot
    got = residual_film_rms_norm(**bad, backend="reference")
    others = [0, 1, 3, 4]
    for mine, right in zip(got, expected, strict=True):
        assert mine[2].isnan().all()
        assert torch.equal(mine[others], right[others])
    got[1][others].sum().backward()
    expected[1][others].sum().backward()
    torch.testing.assert_close(bad["rows"].grad, good["rows"].grad)


def test_h_is_fresh_even_where_nothing_is_added():
    x = torch.randn(2, 4)
    _, h = residual_film_rms_norm(x, None, torch.ones(4), eps=1e-5)
    h.zero_()
    assert x.abs().min() > 0


BAD = {
    "x rank": (dict(x=torch.zeros(33)), ValueError, r"x: expected shape \[T, C\]"),
    "residual shape": (dict(residual=torch.zeros(4, 33)), ValueError, r"residual: .*\(5, 33\)"),
    "residual dtype": (dict(residual=torch.zeros(5, 33).half()), TypeError, "residual: .*float16"),
    "weight size": (dict(weight=torch.zeros(32)), ValueError, r"weight: .*\(33,\).*\(32,\)"),
    "rows layout": (dict(rows=torch.zeros(3, 66)), ValueError, r"rows: expected shape \[U, 2, C\]"),
    "rows size": (dict(rows=torch.zeros(3, 2, 32)), ValueError, r"rows: .*\(3, 2, 33\)"),
    "slots missing": (dict(slots=None), TypeError, "slots: expected a tensor"),
    "slots dtype": (dict(slots=torch.zeros(5).long()), TypeError, "slots: .*int32.*int64"),
    "slot too large": (
        dict(slots=torch.full((5,), 3, dtype=torch.int32)),
        ValueError,
        r"slots: expected values in \[0, 3\), got",
    ),
    "lora_a width": (dict(lora_a=torch.zeros(4, 32)), ValueError, r"lora_a: .*\(4, 33\)"),
    "gates alone": (dict(gates=torch.zeros(3, 4)), ValueError, "gates: .*None without lora_a"),
    "gates width": (
        dict(lora_a=torch.zeros(4, 33), gates=torch.zeros(3, 5)),
        ValueError,
        r"gates: .*\(3, 4\)",
    ),
    "eps": (dict(eps=-1.0), ValueError, "eps: expected a number >= 0, got -1.0"),
    "eps NaN": (dict(eps=float("nan")), ValueError, "eps: expected a number >= 0, got nan"),
    "backend": (dict(backend="gpu"), ValueError, "backend: expected one of auto, native"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_names_argument_expected_and_got(change, error, message):
    inputs = by_name("film").inputs(torch.float32)
    with pytest.raises(error, match=message):
        residual_film_rms_norm(**{**inputs, **change})
