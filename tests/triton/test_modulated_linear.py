"""The modulated linear's kernels in every shape of configuration, and what a row may depend on."""

import pytest
import torch

from fssa_kernels import modulated_linear
from fssa_kernels.gpu import workspace
from fssa_kernels.gpu.device import KNOWN, NOMINAL
from fssa_kernels.ops.modulated_linear import triton_config, triton_impl
from fssa_kernels.ops.modulated_linear.triton_config import Config, heuristic
from tests.kernels.accuracy import check_as_good_as_torch, make, same_bits

CONFIGS = {
    "narrow": Config("fused", 16, 16, 16, 1, False, 4, 2),
    "swapped": Config("fused", 16, 32, 32, 1, True, 4, 2),
    "tall": Config("fused", 32, 16, 16, 1, True, 4, 2),
    "split": Config("fused", 16, 16, 16, 4, False, 4, 2),
    "swapped-split": Config("fused", 16, 16, 32, 2, True, 4, 2),
    # More programs share the tile than there are pieces of K.
    "split-too-often": Config("fused", 16, 64, 64, 8, False, 4, 2),
    "vendor": Config("vendor"),
}
SIZES = {
    "none": dict(family="none", splits=(40, 19)),
    "static": dict(family="static", splits=(40, 19), bias=True),
    "gated": dict(family="gated", splits=(40, 17, 5, 18), rank=5, bias=True),
    "gated-silu": dict(family="gated", splits=(37, 37), epilogue="silu_mul", bias=True),
    "core": dict(family="core", splits=(40, 19), rank=7),
    "core-large": dict(family="core", rank=21, splits=(40,)),
    "core-gelu": dict(family="core", splits=(21, 21), epilogue="gelu_tanh_mul"),
    "factors": dict(family="factors", splits=(40, 19), bias=True),
    "factors-silu": dict(family="factors", splits=(21, 21), epilogue="silu_mul"),
}


@pytest.fixture
def use(monkeypatch):
    """Have every call take one configuration."""

    def fix(config):
        monkeypatch.setattr(triton_impl, "choose", lambda *_: config)

    return fix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration_is_as_good_as_torch(config, sizes, dtype, use):
    use(CONFIGS[config])
    inputs = make("modulated_linear", dtype, num_tokens=37, in_features=75, **SIZES[sizes])
    check_as_good_as_torch("modulated_linear", inputs, "triton")
    for zeros in workspace.SHARED._counters.values():
        assert not zeros.any()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("config", ["narrow", "swapped", "split"])
def test_a_row_is_the_same_alone_and_in_any_batch(config, sizes, use):
    whole = make("modulated_linear", torch.bfloat16, num_tokens=41, **SIZES[sizes])
    use(CONFIGS[config])
    expected = modulated_linear(**whole, backend="triton")
    for rows in (slice(0, 1), slice(7, 8), slice(3, 23), slice(40, 41)):
        part = {**whole, "x": whole["x"][rows]}
        if "slots" in whole:
            part["slots"] = whole["slots"][rows]
        assert same_bits([modulated_linear(**part, backend="triton")], [expected[rows]])


@pytest.mark.parametrize("family", ["static", "gated", "core", "factors"])
def test_a_row_is_the_same_in_every_batch_that_the_heuristic_fuses(family):
    """The term is all there is and cancels, so that a sum in another order shows in fp16."""
    sizes = dict(family=family, rank=8, splits=(48,), in_features=1024)
    whole = make("modulated_linear", torch.float16, num_tokens=17, **sizes)
    whole["weight"].zero_()
    whole["lora_b"][..., 1::2] = -whole["lora_b"][..., ::2]
    whole["lora_a"][..., 1::2, :] = 1.001 * whole["lora_a"][..., ::2, :]
    if family == "gated":
        whole["rows"][:, 1::2] = whole["rows"][:, ::2]
    if family == "core":
        whole["rows"][:] = torch.eye(8)
    part = {**whole, "x": whole["x"][:16]}
    if family != "static":
        part["slots"] = whole["slots"][:16]
    expected = modulated_linear(**whole, backend="triton")
    assert expected.any()
    assert same_bits([modulated_linear(**part, backend="triton")], [expected[:16]])


@pytest.mark.parametrize("sizes", ["gated", "core", "core-large", "gated-silu"])
@pytest.mark.parametrize("config", ["narrow", "split"])
def test_nobody_s_rows_are_the_base_model_s_to_the_bit(config, sizes, use):
    use(CONFIGS[config])
    inputs = make("modulated_linear", torch.bfloat16, num_tokens=9, **SIZES[sizes])
    inputs["slots"][::2] = 0
    modulated = modulated_linear(**inputs, backend="triton")
    for name in ("lora_a", "lora_b", "rows", "slots"):
        del inputs[name]
    base = modulated_linear(**{**inputs, "family": "none"}, backend="triton")
    assert same_bits([modulated[::2]], [base[::2]])


@pytest.mark.parametrize("sizes", ["gated", "core", "core-large", "factors", "gated-silu"])
@pytest.mark.parametrize("config", ["narrow", "split", "vendor"])
@pytest.mark.parametrize("slot", [-1, 4, 2**30])
def test_a_slot_nobody_has_spoils_its_own_row_only(slot, config, sizes, use):
    use(CONFIGS[config])
    inputs = make("modulated_linear", torch.float32, num_tokens=6, **SIZES[sizes])
    expected = modulated_linear(**inputs, backend="triton")
    inputs["slots"][3] = slot
    y = modulated_linear(**inputs, backend="triton")
    assert y[3].isnan().all()
    others = [0, 1, 2, 4, 5]
    assert same_bits([y[others]], [expected[others]])


@pytest.mark.parametrize("sizes", ["gated", "core", "factors"])
def test_a_freed_user_s_row_is_seen_at_once(sizes):
    inputs = make("modulated_linear", torch.float32, num_tokens=6, **SIZES[sizes])
    inputs["slots"][:] = torch.tensor([0, 1, 2, 3, 2, 1])
    state = inputs["lora_b" if sizes == "factors" else "rows"]
    state[2] = float("nan")
    y = modulated_linear(**inputs, backend="triton")
    assert y[[2, 4]].isnan().all()
    assert not y[[0, 1, 3, 5]].isnan().any()


def test_what_is_too_much_for_the_kernels_is_named():
    many = make("modulated_linear", torch.float32, family="none", splits=(3, 3, 3, 3, 3))
    with pytest.raises(ValueError, match="5 projections are stacked, the kernel takes at most 4"):
        modulated_linear(**many, backend="triton")
    wide = make("modulated_linear", torch.float32, family="gated", rank=129)
    with pytest.raises(ValueError, match="the rank is 129, the kernel takes at most 128"):
        modulated_linear(**wide, backend="triton")


OP_AND_DEVICE = ("modulated_linear", "h100")
SHAPES = [
    (4096, (4096, 1024, 1024), "none"),
    (4096, (14336, 14336), "silu_mul"),
    (896, (7,), "none"),
]


@pytest.mark.parametrize("capability", sorted(KNOWN))
@pytest.mark.parametrize("rank", [8, 16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_heuristic_fits_the_device_and_looks_at_rows_for_the_tile_s_height_only(
    capability, rank, dtype
):
    device = KNOWN[capability]
    for in_features, splits, epilogue in SHAPES:
        weight = torch.empty(sum(splits), in_features, dtype=dtype, device="meta")
        few = []
        for num_tokens in (1, 2, 15, 16, 17, 64, 100, 256):
            x = torch.empty(num_tokens, in_features, dtype=dtype, device="meta")
            config = heuristic(device, x, weight, None, "gated", splits, epilogue, rank)
            assert config.way == "fused"
            assert config.num_stages >= 1
            few.append((config.block_n, config.block_k, config.split_k, config.swap))
        assert len(set(few)) == 1
        x = torch.empty(triton_config.VENDOR_FROM_ROWS, in_features, dtype=dtype, device="meta")
        assert heuristic(device, x, weight, None, "gated", splits, epilogue, rank).way == "vendor"


def test_a_measured_configuration_goes_before_the_heuristic_and_rows_are_computed_alike(
    monkeypatch,
):
    table = {}
    monkeypatch.setattr(
        triton_config,
        "lookup",
        lambda op, device, key: table.get(key) if (op, device) == OP_AND_DEVICE else None,
    )

    def chosen(num_tokens, rule=triton_config.choose, factors=torch.bfloat16):
        x, weight = (torch.empty(n, 4096, dtype=torch.bfloat16) for n in (num_tokens, 6144))
        lora_a = torch.empty(16, 4096, dtype=factors)
        return rule(NOMINAL[90], x, weight, lora_a, "gated", [6144], "none", 16)

    def key(rows):
        return f"bfloat16 gated r16 none 6144x4096 m{rows}"

    # What was measured with other rows alone would part them from the rest.
    table[key(4)] = {"split_k": 8, "block_t": 16, "block_n": 128, "num_stages": 2}
    assert chosen(3) == chosen(3, triton_config.heuristic)
    table[key(16)] = {"split_k": 2, "block_k": 64, "swap": False, "num_warps": 8}
    assert chosen(16) == Config(**table[key(16)])
    assert chosen(3) == Config(**{**table[key(4)], "split_k": 2, "block_k": 64, "swap": False})
    table[key(512)] = {"way": "fused", "block_k": 32}
    assert chosen(300) == Config(**table[key(512)])
    assert chosen(600).way == "vendor"
    decisive = {
        tuple(getattr(chosen(n), name) for name in triton_config.ALIKE) for n in (1, 3, 17, 64, 256)
    }
    assert decisive == {("fused", False, 64, 2)}
    table[key(16)]["block_k"] = 256
    assert chosen(256).num_stages < chosen(256, triton_config.heuristic).num_stages
    # Neither what two measurements make together nor one with wider factors has run like this.
    large = {"block_t": 16, "block_n": 256, "num_stages": 5}
    table[key(16)] = {"split_k": 2, **large}
    table[key(32)] = {**large, "block_t": 32, "num_stages": 4}
    assert chosen(16).num_stages == 5
    assert chosen(16, factors=torch.float32).num_stages < 5
    table[key(16)]["block_k"] = 256
    assert chosen(32).num_stages < 4
