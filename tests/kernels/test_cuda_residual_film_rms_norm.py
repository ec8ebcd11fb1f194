"""The CUDA kernels of residual add, FiLM and RMS norm, run on a CPU, against fp64 and PyTorch."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fssa_kernels import explain, residual_film_rms_norm
from fssa_kernels.cuda.backend import NOT_MEASURED
from fssa_kernels.testing import cases
from tests.kernels.accuracy import check_as_good_as_torch, make, same_bits
from tests.kernels.cuda_emulation import device, emulated  # noqa: F401

OP = "residual_film_rms_norm"
HALF = [torch.bfloat16, torch.float16]
SIZES = {
    "film": dict(num_channels=264),
    "film-fp32": dict(num_channels=64, fp32_side=True),
    "plain": dict(num_channels=1032, film=False, weight_offset=1.0),
    "norm-only": dict(num_channels=8, film=False, residual=False),
    "shrink": dict(num_channels=264, low_rank=17, num_tokens=19),
    "shrink-static": dict(num_channels=520, low_rank=48, gated=False, film=False),
    "shrink-aligned": dict(num_channels=72, low_rank=8, residual=False),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_as_good_as_torch(sizes, dtype, device):  # noqa: F811
    check_as_good_as_torch(OP, make(OP, dtype, **SIZES[sizes]), "cuda")


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_any_sizes_and_orders(data, seed, device, emulated):  # noqa: F811
    draw = data.draw
    inputs = make(
        OP,
        draw(st.sampled_from(HALF)),
        seed,
        num_tokens=draw(st.integers(0, 20)),
        num_channels=8 * draw(st.integers(1, 90)),
        residual=draw(st.booleans()),
        film=draw(st.booleans()),
        weight_offset=draw(st.sampled_from([0.0, 1.0])),
        low_rank=draw(st.sampled_from([0, 1, 15, 16, 33, 48])),
        gated=draw(st.booleans()),
    )
    # These are read number by number where they do not lie at multiples of 16 bytes.
    for name in ("weight", "rows", "gates"):
        if inputs.get(name) is not None and draw(st.booleans()):
            inputs[name] = inputs[name].float()
    if inputs.get("rows") is not None and draw(st.booleans()):
        users, _, width = inputs["rows"].shape
        table = inputs["rows"].new_full((users, 2 * width + 5), float("nan"))
        table[:, 3:-2] = inputs["rows"].flatten(1)
        inputs["rows"] = table[:, 3:-2].view(users, 2, width)
    emulated.seed(draw(st.integers(0, 2**32)))
    check_as_good_as_torch(OP, inputs, "cuda")


@pytest.mark.parametrize("sizes", SIZES)
def test_a_row_is_the_same_alone_and_in_any_batch(sizes, device, emulated):  # noqa: F811
    whole = make(OP, torch.bfloat16, **{**SIZES[sizes], "num_tokens": 19})
    expected = residual_film_rms_norm(**whole, backend="cuda")
    for seed, rows in enumerate((slice(0, 19), slice(0, 1), slice(7, 8), slice(5, 18))):
        part = dict(whole)
        for name in ("x", "residual", "slots"):
            part[name] = None if whole.get(name) is None else whole[name][rows]
        emulated.seed(seed)
        got = residual_film_rms_norm(**part, backend="cuda")
        assert same_bits(got, [whole_result[rows] for whole_result in expected])


@pytest.mark.parametrize("slot", [-1, 3, 2**30])
@pytest.mark.parametrize("sizes", ["film", "shrink"])
def test_a_slot_nobody_has_spoils_its_own_row_only(sizes, slot, device):  # noqa: F811
    inputs = make(OP, torch.bfloat16, **{**SIZES[sizes], "num_tokens": 6})
    expected = residual_film_rms_norm(**inputs, backend="cuda")
    inputs["slots"][3] = slot
    got = residual_film_rms_norm(**inputs, backend="cuda")
    others = [0, 1, 2, 4, 5]
    for after, before in zip(got, expected, strict=True):
        assert after[3].isnan().all()
        assert same_bits([after[others]], [before[others]])


def refused(**inputs):
    verdict = next(v for v in explain(OP, **inputs) if v.backend == "cuda")
    assert not verdict.can
    with pytest.raises(ValueError, match="backend 'cuda' cannot serve this call"):
        residual_film_rms_norm(**inputs, backend="cuda")
    return verdict.reason


def test_what_the_kernels_cannot_take_is_named(device):  # noqa: F811
    inputs = make(OP, torch.bfloat16, num_channels=12)
    assert "rows of x are not at multiples of 16 bytes" in refused(**inputs)
    inputs = make(OP, torch.bfloat16, num_channels=16392, film=False)
    expected = "expected channels in multiples of 8, at most 16384, got 16392"
    assert refused(**inputs) == f"cannot: {expected}"
    assert "float32" in refused(**make(OP, torch.float32, num_channels=16))
    inputs = make(OP, torch.bfloat16, num_channels=16, low_rank=3)
    inputs["lora_a"] = inputs["lora_a"].float()
    assert "lora_a is torch.float32" in refused(**inputs)
    wide = make(OP, torch.bfloat16, num_channels=16384, low_rank=3, film=False, num_tokens=1)
    limit = device.shared_bytes
    assert f"bytes of shared memory for a block, got {limit}" in refused(**wide)


def test_auto_passes_the_kernels_over_and_says_so(device):  # noqa: F811
    inputs = make(OP, torch.bfloat16, num_channels=16)
    verdict = next(v for v in explain(OP, **inputs) if v.backend == "cuda")
    assert verdict.can
    assert not verdict.chosen
    assert NOT_MEASURED in verdict.reason


@pytest.mark.parametrize("case", cases(OP), ids=str)
def test_every_case_is_served_right_or_refused(case, device):  # noqa: F811
    for dtype in HALF:
        inputs = case.inputs(dtype)
        if next(v for v in explain(OP, **inputs) if v.backend == "cuda").can:
            check_as_good_as_torch(OP, inputs, "cuda")
        else:
            assert inputs["x"].shape[1] % 8
