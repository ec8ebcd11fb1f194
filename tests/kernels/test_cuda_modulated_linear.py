"""The CUDA kernels of the modulated linear, run on a CPU, against fp64 and PyTorch."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fssa_kernels import explain, extend_weight, modulated_linear
from fssa_kernels.cuda.backend import NOT_MEASURED
from fssa_kernels.cuda.module import emulating
from fssa_kernels.gpu.device import Device
from fssa_kernels.testing import cases
from tests.kernels.accuracy import check_as_good_as_torch, make, same_bits
from tests.kernels.cuda_emulation import DEVICES, device, emulated  # noqa: F401

OP = "modulated_linear"
HALF = [torch.bfloat16, torch.float16]
FAMILIES = ("none", "static", "gated", "core", "factors")
STACKS = {
    "one": dict(splits=(59,)),
    "stacked": dict(splits=(40, 17, 5, 18), bias=True),
    "silu": dict(splits=(37, 37), epilogue="silu_mul", bias=True),
    "gelu": dict(splits=(21, 21), epilogue="gelu_tanh_mul"),
}
# in_features of less than a unit, of whole units, and with an end of one and of two quarters.
WIDTHS = (8, 256, 264, 456)


def wide(stack="one", family="gated", num_tokens=5, dtype=torch.bfloat16, seed=0, **sizes):
    sizes = {"in_features": 264, "rank": 5, **STACKS[stack], **sizes}
    return make(OP, dtype, seed, family=family, num_tokens=num_tokens, **sizes)


def on(emulated, **changes):  # noqa: F811
    """Another device for a part of a test."""
    facts = {"name": "x", "capability": 90, "num_sms": 3, "shared_bytes": 227 << 10, **changes}
    return emulating(emulated, Device(**facts))


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 16, 17, 32])
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_good_as_torch(family, stack, num_tokens, device):  # noqa: F811
    which = FAMILIES.index(family) + list(STACKS).index(stack) + num_tokens
    inputs = wide(
        stack, family, num_tokens, HALF[which % 2], in_features=WIDTHS[which % len(WIDTHS)]
    )
    check_as_good_as_torch(OP, inputs, "cuda")


@pytest.mark.parametrize("capability", list(DEVICES))
@pytest.mark.parametrize("rank", [1, 16, 33, 64])
@pytest.mark.parametrize("family", ["static", "gated", "core", "factors"])
def test_any_rank_on_any_device(family, rank, capability, emulated):  # noqa: F811
    for stack in ("stacked", "silu"):
        with emulating(emulated, DEVICES[capability]):
            inputs = wide(stack, family, 6, rank=rank, in_features=200)
            check_as_good_as_torch(OP, inputs, "cuda")
    with on(emulated, **{**DEVICES[capability].__dict__, "num_sms": 1}):
        check_as_good_as_torch(OP, wide("one", family, 32, rank=rank, splits=(140,)), "cuda")


@pytest.mark.parametrize("capability", list(DEVICES))
@pytest.mark.parametrize("stack", STACKS)
def test_wide_tiles_and_long_runs_of_units(stack, capability, emulated):  # noqa: F811
    """One multiprocessor takes every unit; two share every tile."""
    facts = DEVICES[capability]
    for num_sms in (1, 2):
        with on(emulated, **{**facts.__dict__, "num_sms": num_sms}):
            inputs = wide(stack, "gated", 12, in_features=1160)
            inputs["slots"][3:5] = 0
            check_as_good_as_torch(OP, inputs, "cuda")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_any_sizes_devices_and_orders(dtype, data, seed, emulated):  # noqa: F811
    draw = data.draw
    facts = draw(st.sampled_from(list(DEVICES.values())))
    epilogue = draw(st.sampled_from(["none", "none", "silu_mul", "gelu_tanh_mul"]))
    sizes = draw(st.lists(st.integers(1, 150), min_size=1, max_size=4))
    inputs = make(
        OP,
        dtype,
        seed,
        family=draw(st.sampled_from(FAMILIES)),
        num_tokens=draw(st.integers(0, 32)),
        in_features=8 * draw(st.integers(1, 60)),
        splits=tuple(sizes if epilogue == "none" else sizes[:1] * 2),
        epilogue=epilogue,
        rank=draw(st.integers(1, 40)),
        num_users=draw(st.integers(1, 5)),
        bias=draw(st.booleans()),
    )
    for name in ("lora_b", "rows"):
        if inputs.get(name) is not None and draw(st.booleans()):
            inputs[name] = inputs[name].float()
    with on(emulated, **{**facts.__dict__, "num_sms": draw(st.integers(1, 40))}):
        emulated.seed(draw(st.integers(0, 2**32)))
        check_as_good_as_torch(OP, inputs, "cuda")


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_blocks_threads_and_copies_changes_no_bit(
    family,
    stack,
    device,  # noqa: F811
    emulated,  # noqa: F811
):
    inputs = wide(stack, family, 11)
    expected = modulated_linear(**inputs, backend="cuda")
    for seed in range(1, 5):
        emulated.seed(seed)
        assert same_bits([modulated_linear(**inputs, backend="cuda")], [expected])


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_the_same_alone_and_in_any_batch(family, stack, device):  # noqa: F811
    whole = wide(stack, family, 32)
    expected = modulated_linear(**whole, backend="cuda")
    for rows in (slice(0, 1), slice(7, 8), slice(3, 13), slice(5, 25), slice(31, 32)):
        part = {**whole, "x": whole["x"][rows]}
        if "slots" in whole:
            part["slots"] = whole["slots"][rows]
        assert same_bits([modulated_linear(**part, backend="cuda")], [expected[rows]])


@pytest.mark.parametrize("rank", [5, 64])
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("family", ["gated", "core", "factors"])
def test_nobody_s_rows_are_the_base_model_s_to_the_bit(family, stack, rank, device):  # noqa: F811
    inputs = wide(stack, family, 9, rank=rank)
    inputs["slots"][::2] = 0
    modulated = modulated_linear(**inputs, backend="cuda")
    for name in ("lora_a", "lora_b", "rows", "slots"):
        inputs.pop(name, None)
    base = modulated_linear(**{**inputs, "family": "none"}, backend="cuda")
    assert same_bits([modulated[::2]], [base[::2]])
    assert not same_bits([modulated[1::2]], [base[1::2]])


@pytest.mark.parametrize("slot", [-1, 4, 2**30])
@pytest.mark.parametrize("rank", [5, 64])
@pytest.mark.parametrize("family", ["gated", "core", "factors"])
def test_a_slot_nobody_has_spoils_its_own_row_only(family, rank, slot, device):  # noqa: F811
    inputs = wide("stacked", family, 6, rank=rank)
    expected = modulated_linear(**inputs, backend="cuda")
    inputs["slots"][3] = slot
    y = modulated_linear(**inputs, backend="cuda")
    assert y[3].isnan().all()
    others = [0, 1, 2, 4, 5]
    assert same_bits([y[others]], [expected[others]])


def test_views_that_lie_right_are_read_where_they_are(device):  # noqa: F811
    inputs = wide("stacked", "gated", 7, rank=8)
    expected = modulated_linear(**inputs, backend="cuda")
    inputs["weight"] = extend_weight(inputs["weight"], inputs["lora_b"])[:, :264]
    spread = torch.full((7, 280), float("nan"), dtype=torch.bfloat16)
    spread[:, 8:272] = inputs["x"]
    inputs["x"] = spread[:, 8:272]
    table = torch.full((4, 41), float("nan"), dtype=torch.bfloat16)
    table[:, 3:35] = inputs["rows"]
    inputs["rows"] = table[:, 3:35]
    assert same_bits([modulated_linear(**inputs, backend="cuda")], [expected])


def refused(**inputs):
    verdict = next(v for v in explain(OP, **inputs) if v.backend == "cuda")
    assert not verdict.can
    with pytest.raises(ValueError, match="backend 'cuda' cannot serve this call"):
        modulated_linear(**inputs, backend="cuda")
    assert modulated_linear(**inputs).isfinite().all()
    return verdict.reason


def test_what_the_kernels_cannot_take_is_named(device):  # noqa: F811
    inputs = wide(num_tokens=33)
    assert refused(**inputs) == "cannot: expected 1 to 32 rows of x, got 33"
    inputs = wide(in_features=260)
    assert "rows of x are not at multiples of 16 bytes" in refused(**inputs)
    inputs = wide(in_features=260, num_tokens=1)
    inputs["weight"] = extend_weight(inputs["weight"], inputs["weight"][:, :4])[:, :260]
    inputs["lora_a"] = torch.cat([inputs["lora_a"], inputs["lora_a"][:, :4]], 1)[:, :260]
    assert refused(**inputs) == "cannot: expected in_features in multiples of 8, got 260"
    assert "rank of at most 64, got 65" in refused(**wide(rank=65))
    five = make(OP, torch.bfloat16, family="none", splits=(3,) * 5, in_features=64)
    assert "expected 1 to 4 projections, got 5" in refused(**five)
    inputs = wide()
    shifted = torch.zeros(5 * 264 + 1, dtype=torch.bfloat16)[1:].view(5, 264)
    assert "rows of x are not at multiples of 16 bytes" in refused(**{**inputs, "x": shifted})
    assert "float32, the kernel takes bfloat16 and float16" in refused(**wide(dtype=torch.float32))
    fp32_a = {**inputs, "lora_a": inputs["lora_a"].float()}
    assert "lora_a is torch.float32" in refused(**fp32_a)


def test_a_weight_with_too_many_units_is_named(emulated):  # noqa: F811
    with on(emulated, num_sms=2**24):
        assert "weight of at most 127 tiles of 32 by 128 numbers, got 177" in refused(
            **wide(splits=(32 * 59,))
        )


def test_a_device_too_small_or_too_old_is_named(emulated):  # noqa: F811
    with on(emulated, shared_bytes=32 << 10):
        assert "bytes of shared memory for a block, got 32768" in refused(**wide(num_tokens=32))
    with on(emulated, capability=75):
        assert "capability 8.0 or more, got sm_75" in refused(**wide())


def test_auto_passes_the_kernels_over_and_says_so(device):  # noqa: F811
    verdict = next(v for v in explain(OP, **wide()) if v.backend == "cuda")
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
            assert inputs["x"].shape[1] % 8 or len(inputs["x"]) > 32 or case.name == "gated-strided"
