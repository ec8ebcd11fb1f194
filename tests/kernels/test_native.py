"""The native kernels: every op, case, dtype and instruction set, against fp64 and PyTorch."""

import functools
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fssa_kernels import (
    explain,
    modulated_linear,
    pack_matrix,
    paged_attention,
    residual_film_rms_norm,
    take_rows,
)
from fssa_kernels.dispatch import find, lookup
from fssa_kernels.native import MISSING, NATIVE
from fssa_kernels.testing import cases
from tests.kernels.accuracy import (
    any_inputs,
    by_name,
    check_as_good_as_torch,
    make,
    run,
    same_bits,
)

pytestmark = pytest.mark.skipif(NATIVE is None, reason=str(MISSING))

OPS = (
    "modulated_linear",
    "residual_film_rms_norm",
    "rope_kv_write",
    "paged_attention",
    "take_rows",
    "sample",
)
# The product with the next linear's A is the GPU's: on a CPU nothing reads it.
CASES = [case for op in OPS for case in cases(op) if not case.name.startswith("shrink")]
DTYPES = [torch.float32, torch.bfloat16]


# ---- accuracy


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_good_as_torch_in_the_same_dtype(case, dtype):
    inputs = case.inputs(dtype)
    if case.op == "rope_kv_write":  # what nobody stores stays as it was
        inputs["k_cache"].fill_(float("nan"))
        inputs["v_cache"].fill_(float("nan"))
    assert explain(case.op, **inputs)[0].can
    check_as_good_as_torch(case.op, inputs, "native")


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 24, 32, 48, 64, 576])  # whole cache lines, and not
def test_two_threads_write_for_each_other_what_one_writes(width, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(5, width, dtype=dtype), torch.randn(width, dtype=dtype)
    caches = torch.randn(2, 8, 4, 1, width, dtype=dtype)
    q = torch.randn(5, 3, width, dtype=dtype)
    tables = torch.arange(5, dtype=torch.int32)[:, None]
    lengths = torch.tensor([1, 2, 3, 4, 4], dtype=torch.int32), torch.arange(6, dtype=torch.int32)
    made = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        rows = residual_film_rms_norm(x, x, weight, eps=1e-5, backend="native")
        out = paged_attention(q, *caches, tables, *lengths, scale=1.0, backend="native")
        made.append((*rows, out))
    assert all(map(same_bits, *made))


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_rate_in_registers_is_one_a_machine_can_have(num_threads):
    assert 1e7 < NATIVE.multiply_add_rate(100_000, num_threads) < 1e13 * num_threads


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_barrier_takes_its_time(num_threads):
    assert 0 < NATIVE.barrier_seconds(100, num_threads) < 1


def test_the_norm_leaves_the_next_linear_s_input_to_others():
    verdict = explain("residual_film_rms_norm", **by_name("residual_film_rms_norm", "shrink"))[0]
    assert verdict.reason == "cannot: the kernel has no product with lora_a"


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_any_sizes_and_strides_are_as_good_as_torch(op, dtype, data, seed):
    inputs = any_inputs(data, op, dtype, seed)
    check_as_good_as_torch(op, inputs, "native")


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(0, 7), (7, 0), (0, 0), (33, 0)])
def test_a_linear_with_no_inputs_or_no_outputs(rows, columns, dtype):
    x, weight = torch.randn(3, columns).to(dtype), torch.randn(rows, columns).to(dtype)
    bias = torch.randn(rows).to(dtype)
    y = modulated_linear(x, weight, bias, backend="native")
    assert torch.equal(y, F.linear(x, weight, bias))


@pytest.mark.usefixtures("each_instruction_set")
def test_a_rank_larger_than_the_core_kernel_keeps_on_its_stack():
    inputs = make("modulated_linear", torch.float32, family="core", rank=300)
    check_as_good_as_torch("modulated_linear", inputs, "native")


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("normed", [("q_norm",), ("k_norm",), ("q_norm", "k_norm")], ids=str)
def test_heads_are_normalised_up_to_a_size_and_past_it_by_the_reference(normed):
    for head_dim, served in ((NATIVE.MAX_NORMED_HEAD, True), (NATIVE.MAX_NORMED_HEAD + 1, False)):
        inputs = make("rope_kv_write", torch.float32, head_dim=head_dim, norm=True)
        for name in {"q_norm", "k_norm"} - set(normed):
            del inputs[name]
        assert explain("rope_kv_write", **inputs)[0].can == served
        if served:
            check_as_good_as_torch("rope_kv_write", inputs, "native")


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 16, 37])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_rows_of_a_packed_table_are_those_of_the_table(width, scale, dtype):
    table = torch.randn(70, width).to(dtype)
    index = torch.arange(69, -1, -1, dtype=torch.int32)
    expected = take_rows(table, index, scale=scale, backend="reference")
    assert torch.equal(take_rows(pack_matrix(table), index, scale=scale), expected)
    assert torch.equal(take_rows(table, index, scale=scale, backend="native"), expected)


# ---- a row and its neighbours

PER_ROW = {
    "modulated_linear": ("x", "slots"),
    "residual_film_rms_norm": ("x", "residual", "slots"),
    "rope_kv_write": ("q", "k", "v", "positions", "kv_slots"),
    "paged_attention": ("q", "block_tables", "kv_lens"),
    "take_rows": ("index",),
    "sample": ("logits", "temperature", "top_k", "top_p", "min_p", "uniform", "forced"),
}
LINEAR = dict(num_tokens=300, splits=(37, 18), rank=5, bias=True)
# Some are longer than the kernel's block of keys.
DECODES = tuple((1, 1 + (7 * i % 30 if i % 15 else 60 + i // 4)) for i in range(300))
BATCHES = {
    "none": ("modulated_linear", dict(family="none", in_features=77, **LINEAR)),
    "static": ("modulated_linear", dict(family="static", in_features=77, **LINEAR)),
    # Wide enough that 300 rows are several chunks of the kernel.
    "gated": ("modulated_linear", dict(family="gated", in_features=1501, **LINEAR)),
    "core": ("modulated_linear", dict(family="core", in_features=77, **LINEAR)),
    "factors": ("modulated_linear", dict(family="factors", in_features=77, **LINEAR)),
    "silu": (
        "modulated_linear",
        {**LINEAR, **dict(family="gated", splits=(21, 21), epilogue="silu_mul")},
    ),
    "gelu": (
        "modulated_linear",
        {**LINEAR, **dict(family="none", splits=(21, 21), epilogue="gelu_tanh_mul")},
    ),
    "norm": ("residual_film_rms_norm", dict(num_tokens=300, num_channels=77)),
    "rope": (
        "rope_kv_write",
        dict(num_tokens=300, num_pages=80, head_dim=50, rotary_dim=44, strided=True, norm=True),
    ),
    "attention": ("paged_attention", dict(requests=DECODES, head_dim=83, page_size=3)),
    "window": ("paged_attention", dict(requests=DECODES, window=11, page_size=5)),
    "take_rows": ("take_rows", dict(taken=300)),
    "sample": ("sample", dict(batch=300, vocab_size=131, mixed=True)),
}


@functools.cache
def batch_of(name, dtype):
    op, sizes = BATCHES[name]
    inputs = make(op, dtype, **sizes)
    if op == "modulated_linear":
        options = dict(splits=inputs["splits"], paired=inputs["epilogue"] != "none")
        inputs["weight"] = pack_matrix(inputs["weight"], **options)
        if inputs["family"] not in ("none", "factors"):
            inputs["lora_a"] = pack_matrix(inputs["lora_a"], narrow=True)
            inputs["lora_b"] = pack_matrix(inputs["lora_b"], **options)
    return op, inputs


def rows_of(op, inputs, chosen):
    """A call on some rows of a batch."""
    names = [name for name in PER_ROW[op] if inputs.get(name) is not None]
    part = {**inputs, **{name: inputs[name][chosen] for name in names}}
    if op == "paged_attention":
        part["q_indptr"] = torch.arange(len(part["kv_lens"]) + 1, dtype=torch.int32)
    return part


def results_by_row(op, inputs):
    results = run(op, inputs)
    if op == "rope_kv_write":
        slots = inputs["kv_slots"].long()
        return (results[0], *(cache.flatten(0, 1)[slots] for cache in results[1:]))
    return results


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_a_row_is_bitwise_the_same_in_every_batch(name, dtype):
    op, inputs = batch_of(name, dtype)
    whole = results_by_row(op, inputs)
    for size in (*range(1, 31), 70, 300):
        start = 37 * size % (301 - size)
        chosen = slice(start, start + size)
        part = results_by_row(op, rows_of(op, inputs, chosen))
        assert same_bits(part, [result[chosen] for result in whole]), size
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    mixed = results_by_row(op, rows_of(op, inputs, order))
    assert same_bits(mixed, [result[order] for result in whole])


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_the_number_of_threads_changes_nothing(name, dtype):
    op, inputs = batch_of(name, dtype)
    for chosen in (slice(0, 1), slice(40, 73)):
        part = rows_of(op, inputs, chosen)
        one = run(op, part)
        for num_threads in (2, 3, 8):
            torch.set_num_threads(num_threads)
            assert same_bits(run(op, part), one), num_threads
        torch.set_num_threads(1)


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_nan_in_a_row_stays_there(name, dtype):
    op, inputs = batch_of(name, dtype)
    part = rows_of(op, inputs, slice(40, 73))
    clean = results_by_row(op, part)
    for argument in PER_ROW[op]:
        value = part.get(argument)
        if value is not None and value.is_floating_point():
            part[argument] = value.clone()
            part[argument][9] = float("nan")
    poisoned = results_by_row(op, part)
    others = [row for row in range(33) if row != 9]
    assert same_bits([t[others] for t in poisoned], [t[others] for t in clean])
    if op not in ("take_rows", "sample"):
        assert poisoned[0][9].isnan().all()


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("length", "window", "num_kv_heads"),
    [(150, 0, 2), (150, 0, 1), (150, 5, 2), (150, 70, 2), (1050, 0, 2), (1050, 520, 2)],
)
def test_decode_is_bitwise_any_chunking_of_the_prefill(length, num_kv_heads, window, dtype):
    sizes = dict(num_heads=6, num_kv_heads=num_kv_heads, head_dim=83, page_size=7)
    # Neighbours before and after it, so that its pages and rows are not the first.
    requests = ((2, 9), (length, length), (1, 30))
    inputs = make("paged_attention", dtype, requests=requests, window=window, **sizes)
    whole = run("paged_attention", inputs)[0][2 : 2 + length]
    assert whole.isfinite().all()
    for chunks in (
        (length,),
        (1,) * length,
        (64, 64, length - 128),
        (33, 100, length - 133),
        (length - 1, 1),
        (length - 80, *(10,) * 8),
    ):
        stop, parts = 0, []
        for size in chunks:
            stop += size
            step = {
                **inputs,
                "q": inputs["q"][2 + stop - size : 2 + stop],
                "block_tables": inputs["block_tables"][1:2],
                "kv_lens": torch.tensor([stop], dtype=torch.int32),
                "q_indptr": torch.tensor([0, size], dtype=torch.int32),
            }
            parts.append(run("paged_attention", step)[0])
        assert same_bits([torch.cat(parts)], [whole]), chunks


# More heads than a piece of work has rows; KV heads whose heads do not fill a piece; long requests
# beside short ones, so that threads part in the middle of a KV head's heads; so many keys that they
# part in the middle of a token's keys, too.
@pytest.mark.parametrize(
    "requests",
    [
        ((1, 200),),
        ((1, 3), (1, 130), (40, 90), (3, 70)),
        ((33, 33),),
        ((1, 1025),),
        ((1, 5200),),
        ((1, 40), (1, 1900), (5, 1300), (1, 512), (1, 1200)),
    ],
)
@pytest.mark.parametrize("window", [0, 1500])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (7, 1), (14, 2), (110, 1), (5, 5)])
def test_threads_share_heads_and_keys_out(num_heads, num_kv_heads, window, requests):
    heads = dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=16, page_size=5)
    inputs = make("paged_attention", torch.bfloat16, requests=requests, window=window, **heads)
    torch.set_num_threads(1)
    check_as_good_as_torch("paged_attention", inputs, "native")
    alone = run("paged_attention", inputs)
    for num_threads in (2, 3, 7):
        torch.set_num_threads(num_threads)
        assert same_bits(run("paged_attention", inputs), alone), num_threads


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (3, 4)])
def test_rows_of_no_request_are_zero_and_not_read(before, after, num_threads):
    inputs = make("paged_attention", torch.bfloat16, requests=((3, 10), (1, 6)), head_dim=37)
    torch.set_num_threads(num_threads)
    expected = F.pad(run("paged_attention", inputs)[0], (0, 0, 0, 0, before, after))
    inputs["q"] = F.pad(inputs["q"], (0, 0, 0, 0, before, after), value=float("nan"))
    inputs["q_indptr"] += before
    assert same_bits(run("paged_attention", inputs), [expected])


def test_calls_from_several_threads_do_not_disturb_each_other():
    batches = [batch_of(name, torch.bfloat16) for name in ("gated", "attention", "norm", "sample")]
    parts = [(op, rows_of(op, inputs, slice(0, 20))) for op, inputs in batches]
    expected, wrong = [run(*part) for part in parts], []

    def work(part, right):
        torch.set_num_threads(1)
        wrong.extend(1 for _ in range(20) if not same_bits(run(*part), right))

    pairs = zip(parts, expected, strict=True)
    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- instruction sets


def test_every_instruction_set_can_be_chosen_by_name():
    names, before = NATIVE.instruction_sets(), NATIVE.instruction_set()
    assert names[-1] == "portable"
    try:
        for name in names:
            NATIVE.set_instruction_set(name)
            assert NATIVE.instruction_set() == name
        with pytest.raises(ValueError, match=r"instruction set: expected one of .*, got sse9"):
            NATIVE.set_instruction_set("sse9")
        assert NATIVE.instruction_set() == names[-1]
    finally:
        NATIVE.set_instruction_set(before)


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_the_native_kernel_and_the_reference_where_it_cannot(op):
    assert find(op, lookup(op).backends, "native").records
    inputs = by_name(op, cases(op)[0].name)
    if op == "modulated_linear":
        inputs["weight"] = pack_matrix(inputs["weight"])
    assert explain(op, **inputs)[0].chosen
    wide = cases(op)[0].inputs(torch.float64)
    native, *_, reference = explain(op, **wide)
    assert "float64, the kernel takes float32 and bfloat16" in native.reason
    assert reference.chosen
