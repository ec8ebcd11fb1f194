import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fssa_kernels import rope_kv_write
from fssa_kernels.ops.rope_kv_write.cases import _Sizes
from fssa_kernels.ops.rope_kv_write.reference import apply_rope
from fssa_kernels.testing import cases
from tests.kernels.kernel_oracles import head_norm_oracle, rope_oracle

CASES = cases("rope_kv_write")
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
TOLERANCE = {
    torch.float64: dict(rtol=1e-12, atol=1e-12),
    torch.float32: dict(rtol=1e-6, atol=1e-6),
    torch.bfloat16: dict(rtol=1.01 * 2**-8, atol=1e-6),  # rounded once
}


def by_name(name):
    return next(case for case in CASES if case.name == name)


def check(inputs, dtype):
    k_before, v_before = inputs["k_cache"].clone(), inputs["v_cache"].clone()
    rotated = rope_kv_write(**inputs)
    assert rotated.dtype == dtype
    q, k = (head_norm_oracle(inputs, name) for name in ("q", "k"))
    expected = rope_oracle(q, inputs["positions"], inputs["cos_sin"])
    torch.testing.assert_close(rotated.double(), expected, **TOLERANCE[dtype])

    k_expected, v_expected = k_before.double(), v_before.double()
    rotated_k = rope_oracle(k, inputs["positions"], inputs["cos_sin"])
    page_size = k_before.shape[1]
    for t, slot in enumerate(inputs["kv_slots"].tolist()):
        if slot >= 0:
            k_expected[slot // page_size, slot % page_size] = rotated_k[t]
            v_expected[slot // page_size, slot % page_size] = inputs["v"][t].double()
    torch.testing.assert_close(inputs["k_cache"].double(), k_expected, **TOLERANCE[dtype])
    assert torch.equal(inputs["v_cache"].double(), v_expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case, dtype):
    check(case.inputs(dtype), dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(0, 9),
    num_kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    half=st.integers(1, 5),
    extra=st.integers(0, 3),
    page_size=st.integers(1, 5),
    num_skipped=st.integers(0, 4),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_sizes_match_the_oracle(num_kv_heads, groups, half, extra, seed, **sizes):
    made = _Sizes(
        num_heads=num_kv_heads * groups,
        num_kv_heads=num_kv_heads,
        head_dim=2 * half + extra,
        rotary_dim=2 * half,
        num_pages=9,
        **sizes,
    ).make(torch.Generator().manual_seed(seed), torch.float64)
    check(made, torch.float64)


def test_writes_through_strided_caches():
    """A layer's slice of one buffer for all layers, pages first."""
    inputs = by_name("plain").inputs(torch.float32)
    for name in ("k_cache", "v_cache"):
        buffer = torch.zeros(inputs[name].shape[0], 3, *inputs[name].shape[1:])
        inputs[name] = buffer[:, 1].copy_(inputs[name])
    check(inputs, torch.float32)


def test_position_zero_turns_nothing():
    x = torch.randn(1, 2, 8)
    angles = torch.zeros(1, 4)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    assert torch.equal(apply_rope(x, torch.zeros(1, dtype=torch.int32), cos_sin), x)


def test_apply_rope_is_differentiable():
    inputs = by_name("partial-rotation").inputs(torch.float64)
    q = inputs["q"].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q: apply_rope(q, inputs["positions"], inputs["cos_sin"]), [q]
    )


def test_nan_in_one_token_stays_there():
    inputs = by_name("plain").inputs(torch.float32)
    inputs["k_cache"].zero_()
    inputs["v_cache"].zero_()
    for name in ("q", "k", "v"):
        inputs[name][2] = float("nan")
    rotated = rope_kv_write(**inputs)
    assert rotated[[0, 1, 3, 4]].isfinite().all()
    slot = int(inputs["kv_slots"][2])
    for name in ("k_cache", "v_cache"):
        flat = inputs[name].flatten(0, 1)
        assert flat[slot].isnan().all()
        flat[slot] = 0
        assert flat.isfinite().all()


@pytest.mark.parametrize("name", ["q", "k", "v", "k_cache"])
def test_refuses_to_record_a_gradient(name):
    inputs = by_name("plain").inputs(torch.float32)
    inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match=r"rope_kv_write: inference only.*torch\.no_grad"):
        rope_kv_write(**inputs)
    with torch.no_grad():
        rope_kv_write(**inputs)


BAD = {
    "q rank": (dict(q=torch.zeros(5, 48)), ValueError, r"q: expected shape \[T, H, D\]"),
    "k tokens": (dict(k=torch.zeros(4, 2, 8)), ValueError, r"k: .*\(5, 2, 8\).*\(4, 2, 8\)"),
    "v heads": (dict(v=torch.zeros(5, 3, 8)), ValueError, r"v: .*\(5, 2, 8\).*\(5, 3, 8\)"),
    "v dtype": (dict(v=torch.zeros(5, 2, 8).half()), TypeError, "v: .*float32.*float16"),
    "positions dtype": (dict(positions=torch.zeros(5).long()), TypeError, "positions: .*int32"),
    "position too large": (
        dict(positions=torch.full((5,), 50, dtype=torch.int32)),
        ValueError,
        r"positions: expected values in \[0, 50\), got",
    ),
    "odd rotation": (dict(cos_sin=torch.zeros(50, 7)), ValueError, "cos_sin: .*even rotary_dim"),
    "wide rotation": (dict(cos_sin=torch.zeros(50, 10)), ValueError, "cos_sin: .*at most D = 8"),
    "cos_sin dtype": (dict(cos_sin=torch.zeros(50, 8).half()), TypeError, "cos_sin: .*float32"),
    "cache heads": (dict(k_cache=torch.zeros(5, 4, 3, 8)), ValueError, "k_cache: .*2, 8"),
    "cache dtype": (dict(v_cache=torch.zeros(5, 4, 2, 8).half()), TypeError, "v_cache: .*float16"),
    "slots length": (dict(kv_slots=torch.zeros(4, dtype=torch.int32)), ValueError, "kv_slots: "),
    "slot too large": (
        dict(kv_slots=torch.tensor([0, 1, 2, 3, 20], dtype=torch.int32)),
        ValueError,
        r"kv_slots: expected .*20\), got .*20",
    ),
    "slot below -1": (
        dict(kv_slots=torch.tensor([0, 1, 2, 3, -2], dtype=torch.int32)),
        ValueError,
        r"kv_slots: expected .*20\), got .*-2",
    ),
    "backend": (dict(backend="gpu"), ValueError, "backend: expected one of auto, native"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_an_error_and_writes_nothing(change, error, message):
    inputs = by_name("plain").inputs(torch.float32)
    before = inputs["k_cache"].clone(), inputs["v_cache"].clone()
    with pytest.raises(error, match=message):
        rope_kv_write(**{**inputs, **change})
    assert torch.equal(inputs["k_cache"], before[0])
    assert torch.equal(inputs["v_cache"], before[1])
