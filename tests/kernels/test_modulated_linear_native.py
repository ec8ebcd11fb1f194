import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fssa_kernels import explain, modulated_linear, pack_matrix
from fssa_kernels.native import MISSING, NATIVE
from fssa_kernels.ops.modulated_linear.cases import _Sizes
from fssa_kernels.testing import cases
from tests.kernels.kernel_oracles import modulated_linear_oracle

pytestmark = pytest.mark.skipif(NATIVE is None, reason=str(MISSING))

CASES = cases("modulated_linear")
DTYPES = [torch.float32, torch.bfloat16]
# Errors below this are rounding luck: a few units in the last place of values of order one.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2**-9}


def native(inputs):
    return modulated_linear(**inputs, backend="native")


def make(dtype, seed=0, **sizes):
    return _Sizes(**sizes).make(torch.Generator().manual_seed(seed), dtype)


def check_as_good_as_torch(inputs, dtype):
    expected = modulated_linear_oracle(**inputs)
    got = native(inputs)
    assert got.dtype == dtype
    assert got.shape == expected.shape
    if expected.numel():
        plain = modulated_linear(**inputs, backend="reference")
        plain_error = (plain.double() - expected).abs().max()
        assert (got.double() - expected).abs().max() <= 2 * plain_error + FLOOR[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_good_as_torch_in_the_same_dtype(case, dtype):
    check_as_good_as_torch(case.inputs(dtype), dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(["none", "static", "gated", "core", "factors"]),
    dtype=st.sampled_from(DTYPES),
    num_tokens=st.integers(0, 70),
    in_features=st.integers(1, 70),
    splits=st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple),
    rank=st.integers(1, 20),
    num_users=st.integers(1, 5),
    strided=st.booleans(),
    fp32_side=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_sizes_are_as_good_as_torch(dtype, seed, **sizes):
    check_as_good_as_torch(make(dtype, seed, **sizes), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["none", "static", "gated", "core", "factors"])
def test_a_row_is_bitwise_the_same_in_every_batch(family, dtype):
    """Batches on both sides of the kernel's 64-row chunk, an odd width, several projections."""
    inputs = make(
        dtype, family=family, num_tokens=70, in_features=77, splits=(37, 18), rank=5, bias=True
    )
    whole = native(inputs)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    for rows in ([0], [69], [3, 68], list(range(5, 70)), order.tolist()):
        part = {**inputs, "x": inputs["x"][rows]}
        if "slots" in inputs:
            part["slots"] = inputs["slots"][rows]
        assert torch.equal(native(part), whole[rows]), rows


@pytest.mark.parametrize(("num_tokens", "in_features"), [(9, 77), (330, 800)])
def test_result_does_not_depend_on_the_number_of_threads(num_tokens, in_features):
    """Few rows, and more than a chunk of them, whose tiles threads take from one another."""
    inputs = make(
        torch.bfloat16,
        family="gated",
        num_tokens=num_tokens,
        in_features=in_features,
        splits=(137, 18),
    )
    one = native(inputs)
    torch.set_num_threads(3)
    for _ in range(20):
        assert torch.equal(native(inputs), one)


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["static", "gated", "core"])
@pytest.mark.parametrize(("width", "parts"), [(256, 2), (512, 4)])
def test_no_bit_depends_on_who_takes_which_part_of_a(width, parts, family, dtype):
    """Threads share out the parts of a tile that is alone, and leave those of several together."""
    assert NATIVE.shrink_parts(width) == parts
    inputs = make(dtype, family=family, num_tokens=27, in_features=width, splits=(37, 18), rank=20)
    check_as_good_as_torch(inputs, dtype)
    torch.set_num_threads(1)
    whole = native(inputs)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for rows in ([0], [26], [3, 8], list(range(4, 16)), list(range(13)), list(range(27))):
            part = {**inputs, "x": inputs["x"][rows]}
            if "slots" in inputs:
                part["slots"] = inputs["slots"][rows]
            assert torch.equal(native(part), whole[rows]), (threads, rows)


@pytest.mark.parametrize(
    ("width", "parts"), [(0, 1), (1, 1), (128, 1), (264, 1), (272, 2), (576, 4), (1000, 1)]
)
def test_a_lies_in_as_many_parts_as_are_equal_and_long(width, parts):
    assert NATIVE.shrink_parts(width) == parts


def test_calls_from_several_threads_do_not_disturb_each_other():
    inputs = make(torch.float32, family="core", num_tokens=66, in_features=77, splits=(137, 18))
    expected, results = native(inputs), []
    threads = [
        threading.Thread(target=lambda: results.extend(native(inputs) for _ in range(20)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 60
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["gated", "core", "factors"])
def test_slot_zero_is_exactly_the_base(family, dtype):
    inputs = make(dtype, family=family, splits=(17, 9), bias=True)
    inputs["slots"].zero_()
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    base = native({"x": x, "weight": weight, "bias": bias, "splits": [17, 9]})
    assert torch.equal(native(inputs), base)


@pytest.mark.parametrize("family", ["gated", "core", "factors"])
def test_nan_elsewhere_never_leaks(family):
    inputs = make(torch.float32, family=family)
    inputs["slots"] = torch.tensor([0, 1, 3, 1, 0], dtype=torch.int32)
    clean = native(inputs)
    table = inputs["lora_a"] if family == "factors" else inputs["rows"]
    table[2] = float("nan")
    inputs["x"][1] = float("nan")
    y = native(inputs)
    assert y[1].isnan().all()
    others = [0, 2, 3, 4]
    assert torch.equal(y[others], clean[others])


def test_bf16_result_is_rounded_once_and_to_nearest_even():
    """Powers of two make every sum exact, so that only the final rounding is left."""
    x = torch.tensor([[1.0, 2.0**-8], [1.0, 3 * 2.0**-8], [-1.0, -(2.0**-8)]]).bfloat16()
    weight = torch.ones(1, 2).bfloat16()
    y = native({"x": x, "weight": weight})
    # 1 + 2^-8 lies midway between 1 and 1 + 2^-7; 1 + 3 * 2^-8 between 1 + 2^-7 and 1 + 2^-6.
    assert y.flatten().tolist() == [1.0, 1.0 + 2.0**-6, -1.0]


def test_bf16_keeps_infinities_and_nans():
    x = torch.tensor([[float("inf")], [float("-inf")], [float("nan")], [3.0e38]]).bfloat16()
    y = native({"x": x, "weight": torch.full((1, 1), 2.0).bfloat16()}).flatten()
    assert y[0] == float("inf")
    assert y[1] == float("-inf")
    assert y[2].isnan()
    assert y[3] == float("inf")


def test_bf16_keeps_a_nan_whose_payload_rounding_would_overflow():
    inputs = make(torch.bfloat16, family="gated", fp32_side=True)
    inputs["rows"].view(torch.int32)[1] = 0x7FFFFFFF
    inputs["slots"].fill_(1)
    assert native(inputs).isnan().all()


@pytest.mark.parametrize("bad", [-1, 4])
def test_a_slot_out_of_range_is_an_error(bad):
    inputs = make(torch.float32, family="gated")
    inputs["slots"][3] = bad
    with pytest.raises(
        ValueError, match=rf"slots: expected values in \[0, 4\), got {bad} at row 3"
    ):
        native(inputs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda i: {"x": i["x"].t().contiguous().t()}, "last dimension of x is not contiguous"),
        (lambda i: {"rows": i["rows"].mT.contiguous().mT}, "last dimension of rows"),
        (lambda i: {"rows": F.pad(i["rows"], (0, 1))[..., :-1]}, "slot's part of rows is not"),
        (lambda i: {n: i[n].double() for n in ("x", "weight", "lora_a", "lora_b")}, "float64"),
    ],
)
def test_what_it_cannot_serve_is_refused_when_named_and_served_otherwise(change, reason):
    inputs = make(torch.float32, family="core")
    expected = modulated_linear_oracle(**inputs)
    changed = {**inputs, **change(inputs)}
    if changed["x"].dtype == torch.float64:
        changed["rows"] = changed["rows"].double()
    with pytest.raises(ValueError, match=rf"backend 'native' cannot serve this call: .*({reason})"):
        native(changed)
    torch.testing.assert_close(modulated_linear(**changed).double(), expected, rtol=0, atol=2e-5)


def packed(inputs):
    """The same call on packed weights."""
    options = dict(splits=inputs.get("splits"), paired=inputs.get("epilogue", "none") != "none")
    changed = {**inputs, "weight": pack_matrix(inputs["weight"], **options)}
    if inputs.get("lora_b") is not None and inputs["family"] != "factors":
        changed["lora_a"] = pack_matrix(inputs["lora_a"], narrow=True)
        changed["lora_b"] = pack_matrix(inputs["lora_b"], **options)
    return changed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_weights_are_chosen_by_auto_and_change_nothing(case, dtype):
    inputs = case.inputs(dtype)
    changed = packed(inputs)
    assert torch.equal(modulated_linear(**changed), native(inputs))
    assert explain(modulated_linear, **changed)[0].chosen
    # The reference reads them too: it is what they mean.
    reference = modulated_linear(**inputs, backend="reference")
    assert torch.equal(modulated_linear(**changed, backend="reference"), reference)


def test_auto_does_not_pack_for_one_call():
    verdict = explain(modulated_linear, **make(torch.float32, family="gated"))[0]
    assert verdict.can
    assert not verdict.chosen
    assert "not packed" in verdict.reason


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [(1,), (16,), (33,), (17, 5, 40), (16, 16)], ids=str)
@pytest.mark.parametrize("width", [1, 2, 7, 64, 256, 512])
def test_packing_is_undone_to_the_bit(dtype, splits, width):
    matrix = torch.randn(sum(splits), width + 3).to(dtype)[:, 1 : 1 + width]
    matrix[0, 0] = float("nan")
    can_pair = len(splits) == 2 and splits[0] == splits[1]
    for paired, narrow in itertools.product({False, can_pair}, (False, True)):
        again = pack_matrix(matrix, splits=splits, paired=paired, narrow=narrow).unpack()
        assert torch.equal(again.view(torch.uint8), matrix.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(splits=[17, 10]), "weight was packed for splits"),
        (dict(lora_a=False), "lora_a was packed with narrow=False"),
        (dict(x=torch.zeros(5, 38)), r"weight: expected shape \(26, 38\), got packed shape"),
        (dict(x=torch.zeros(5, 37).bfloat16()), "weight: expected dtype torch.bfloat16, got pack"),
    ],
)
def test_packed_weights_that_do_not_fit_are_refused(change, message):
    inputs = packed(make(torch.float32, family="gated", splits=(17, 9)))
    if "splits" in change:
        inputs["lora_b"] = inputs["lora_b"].unpack()
        inputs["weight"] = pack_matrix(torch.zeros(27, 37), splits=[10, 17])
        inputs["lora_b"] = torch.zeros(27, 3)
    if "lora_a" in change:
        change = {"lora_a": pack_matrix(inputs["lora_a"].unpack())}
    with pytest.raises((ValueError, TypeError), match=message):
        native({**inputs, **change})


@pytest.mark.parametrize(
    ("options", "got"),
    [
        (dict(splits=[3, 3]), r"splits \(3, 3\) with paired=False"),
        (dict(splits=[3, 3], paired=True), r"splits \(3, 3\) with paired=True"),
    ],
)
def test_lora_a_is_packed_as_one_split(options, got):
    """Of several it would be read as if they were one: other columns, no error."""
    inputs = packed(make(torch.float32, family="gated", splits=(17, 9)))
    expected = modulated_linear(**inputs, backend="reference")
    inputs["lora_a"] = pack_matrix(inputs["lora_a"].unpack(), narrow=True, **options)
    message = rf"lora_a was packed for {got}, not for one split \(6,\) with paired=False"
    with pytest.raises(ValueError, match=message):
        native(inputs)
    assert torch.equal(modulated_linear(**inputs), expected)


def test_no_sizes_are_no_splits():
    nothing = torch.zeros(0, 3)
    with pytest.raises(ValueError, match=r"splits: expected positive sizes that sum to N = 0, got"):
        modulated_linear(torch.zeros(2, 3), nothing, splits=[])
    with pytest.raises(ValueError, match="splits: expected at least one size and a sum of N = 0"):
        pack_matrix(nothing, splits=[])


@pytest.mark.parametrize("trained", ["x", "weight", "bias", "lora_a", "lora_b", "rows"])
def test_packed_weights_have_no_gradient_and_say_so(trained):
    plain = make(torch.float32, family="gated", bias=True)
    inputs = {**packed(plain), trained: plain[trained].requires_grad_()}
    name = "lora_a" if trained == "weight" else "weight"
    with pytest.raises(RuntimeError, match=f"{name}: expected a tensor where a gradient"):
        modulated_linear(**inputs)
    with torch.no_grad():
        assert modulated_linear(**inputs).isfinite().all()
