"""The native kernels: every op, case, dtype and instruction set, against fp64 and PyTorch."""

import functools
import importlib
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fssa_kernels
from fssa_kernels import explain, modulated_linear, pack_matrix, paged_attention, sample, take_rows
from fssa_kernels.dispatch import find, lookup
from fssa_kernels.native import MISSING, NATIVE
from fssa_kernels.testing import cases, within_wider
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


@pytest.fixture(scope="module", params=NATIVE.instruction_sets() if NATIVE else [])
def each_instruction_set(request):
    before = NATIVE.instruction_set()
    NATIVE.set_instruction_set(request.param)
    yield
    NATIVE.set_instruction_set(before)


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
@pytest.mark.parametrize(("window", "num_kv_heads"), [(0, 2), (0, 1), (5, 2), (70, 2)])
def test_decode_is_bitwise_any_chunking_of_the_prefill(num_kv_heads, window, dtype):
    length = 150
    sizes = dict(num_heads=6, num_kv_heads=num_kv_heads, head_dim=83, page_size=7)
    # Neighbours before and after it, so that its pages and rows are not the first.
    requests = ((2, 9), (length, length), (1, 30))
    inputs = make("paged_attention", dtype, requests=requests, window=window, **sizes)
    whole = run("paged_attention", inputs)[0][2 : 2 + length]
    assert whole.isfinite().all()
    for chunks in ((150,), (1,) * 150, (64, 64, 22), (33, 100, 17), (149, 1), (70, *(10,) * 8)):
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


# ---- sample


def settings_of(batch, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Arguments of `sample` for one row of logits drawn from at evenly spread numbers."""
    return {
        "temperature": torch.full((batch,), temperature),
        "top_k": torch.full((batch,), top_k, dtype=torch.int32),
        "top_p": torch.full((batch,), top_p),
        "min_p": torch.full((batch,), min_p),
        "uniform": (torch.arange(batch, dtype=torch.float64) + 0.5).div(batch).float(),
        "forced": torch.full((batch,), -1, dtype=torch.int32),
    }


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Of every token, from the definition, one token after another."""
    logits = logits.double().tolist()
    top = max(logits)
    weights = [math.exp((value - top) / temperature) for value in logits]
    kept = sorted(range(len(logits)), key=lambda i: (-weights[i], i))
    kept = kept[:top_k] if top_k else kept
    total, before, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if nucleus and top_p < 1 and before >= top_p * total:
            break
        nucleus.append(i)
        before += weights[i]
    mass = torch.zeros(len(logits), dtype=torch.float64)
    for i in nucleus:
        mass[i] = weights[i] if weights[i] >= min_p else 0.0
    return mass / mass.sum()


FILTERS = {
    "temperature": dict(temperature=0.7),
    "hot": dict(temperature=5.0),
    "top-k": dict(top_k=7),
    "top-p": dict(top_p=0.8),
    "top-p-of-nothing": dict(top_p=0.0),
    "min-p": dict(min_p=0.1),
    "top-k-then-top-p": dict(top_k=9, top_p=0.6),
    "all": dict(temperature=1.3, top_k=20, top_p=0.9, min_p=0.05),
}


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS.keys())
@pytest.mark.parametrize(("vocab_size", "draws"), [(37, 2000), (4500, 100)])
def test_frequencies_of_draws_are_the_probabilities(vocab_size, draws, options, dtype):
    generator = torch.Generator().manual_seed(5)
    logits = (2 * torch.randn(vocab_size, generator=generator)).to(dtype)
    chosen = settings_of(draws, **options)
    tokens, _ = sample(logits.expand(draws, -1), **chosen, backend="native")
    right = probabilities(logits, **options)
    # Evenly spread numbers: each token is met once too often or too rarely at most.
    counts = torch.bincount(tokens.long(), minlength=vocab_size)
    assert (counts - draws * right).abs().max() <= 1.01
    assert (right[tokens.long()] > 0).all()
    # And each draw lies in its token's part of the cumulated mass.
    stop, uniform = right.cumsum(0), chosen["uniform"].double()
    drawn = tokens.long()
    assert (uniform <= stop[drawn] + 1e-6).all()
    assert (uniform >= stop[drawn] - right[drawn] - 1e-6).all()


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tied", [(3, 4), (15, 16), (5, 4095), (4095, 4096), (4097, 8191, 9000)])
def test_of_equal_logits_the_smaller_index_wins(tied, dtype):
    logits = torch.randn(1, 9001, generator=torch.Generator().manual_seed(1)).clamp(max=3).to(dtype)
    logits[0, list(tied)] = 5.0
    for options in (dict(temperature=0.0), dict(top_k=1), dict(top_p=1e-6)):
        chosen = settings_of(1, **options)
        chosen["uniform"].fill_(0.999)
        assert sample(logits, **chosen, backend="native")[0].tolist() == [tied[0]], options


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize(
    ("options", "drawn"), [(dict(top_k=3), [0, 1, 2]), (dict(top_p=0.125), [0, 1, 2, 3, 4])]
)
def test_filters_keep_the_smaller_of_equal_indices(options, drawn):
    tokens, _ = sample(torch.zeros(60, 40), **settings_of(60, **options), backend="native")
    assert tokens.unique().tolist() == drawn


@pytest.mark.usefixtures("each_instruction_set")
def test_forced_tokens_are_taken_whatever_the_logits_say():
    logits = torch.randn(4, 131)
    logits[1, 5] = float("-inf")
    logits[2] = float("nan")
    chosen = settings_of(4, temperature=0.0)
    chosen["temperature"][3] = 1.0
    chosen["forced"] = torch.tensor([0, 5, 130, 77], dtype=torch.int32)
    tokens, logprobs = sample(logits, **chosen, backend="native")
    assert tokens.tolist() == [0, 5, 130, 77]
    assert logprobs[1] == float("-inf")
    right = logits.double().log_softmax(1)
    for row in (0, 3):
        assert abs(logprobs[row] - right[row, tokens[row]]) < 2e-6


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
def test_logprobs_against_fp64(scale, dtype):
    logits = (scale * torch.randn(20, 9001, generator=torch.Generator().manual_seed(1))).to(dtype)
    chosen = settings_of(20)
    chosen["forced"] = torch.arange(20, dtype=torch.int32) * 470
    _, logprobs = sample(logits, **chosen, backend="native")
    right = logits.double().log_softmax(1).gather(1, chosen["forced"].long()[:, None])[:, 0]
    assert ((logprobs - right).abs() <= 2e-6 + 3e-7 * right.abs()).all()


NAN, INF = float("nan"), float("inf")
STRANGE = {
    "all NaN": lambda row: row.fill_(NAN),
    "one NaN": lambda row: row[7:8].fill_(NAN),
    "first NaN": lambda row: row[:1].fill_(NAN),
    "a chunk of NaN": lambda row: row[:4096].fill_(NAN),
    "one +inf": lambda row: row[4100:4101].fill_(INF),
    "all +inf": lambda row: row.fill_(INF),
    "all -inf": lambda row: row.fill_(-INF),
    "a chunk of -inf": lambda row: row[:4096].fill_(-INF),
    "both": lambda row: row[3:5].copy_(torch.tensor([INF, -INF])),
    "huge": lambda row: row.mul_(1e30),
}


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", STRANGE.values(), ids=STRANGE.keys())
@pytest.mark.parametrize("options", [dict(temperature=0.0), *FILTERS.values()], ids=str)
def test_strange_logits_give_some_token_and_spare_the_other_rows(options, change, dtype):
    logits = torch.randn(3, 4500, generator=torch.Generator().manual_seed(1)).to(dtype)
    chosen = settings_of(3, **options)
    clean = sample(logits, **chosen, backend="native")
    change(logits[1])
    logits = within_wider(logits)
    tokens, logprobs = sample(logits, **chosen, backend="native")
    assert 0 <= tokens[1] < 4500
    assert same_bits([tokens[::2], logprobs[::2]], [t[::2] for t in clean])
    if logits[1].isfinite().any() and not (logits[1].isnan() | (logits[1] == INF)).any():
        # What cannot be drawn is not, and the rest is as ever.
        assert logits[1, tokens[1]].isfinite()
        expected = sample(logits, **chosen, backend="reference")
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(logprobs, expected[1], rtol=1e-6, atol=2e-6)


# ---- bad input


def replace(name, row, value):
    def change(inputs):
        inputs[name] = inputs[name].clone()
        inputs[name][row] = value

    return change


def bad_index(op, case, name, low, high, row=-1, shown=None):
    """Values just outside [low, high) in one row of an index."""
    for value in (low - 1, high, 2**31 - 1, -(2**31)):
        message = rf"{op}: {shown or name}: expected values in \[{low}, {high}\), got {value} at"
        yield pytest.param(
            op, case, replace(name, row, value), message, id=f"{op}-{case}-{name}-{row}-{value}"
        )


def bad_lengths(name, row, value):
    message = (
        "paged_attention: q_indptr and kv_lens: expected kv_lens of at most 16, q_indptr that "
        rf"rises from 0 to at most 3 by at most kv_lens, got .*{value}"
    )
    change = replace(name, row, value)
    return pytest.param("paged_attention", "decode", change, message, id=f"{name}-{row}-{value}")


BAD = [
    *bad_index("modulated_linear", "gated", "slots", 0, 4),
    *bad_index("modulated_linear", "gated", "slots", 0, 4, row=0),
    *bad_index("modulated_linear", "core", "slots", 0, 4),
    *bad_index("modulated_linear", "factors", "slots", 0, 4),
    *bad_index("residual_film_rms_norm", "film", "slots", 0, 3),
    *bad_index("residual_film_rms_norm", "film", "slots", 0, 3, row=0),
    *bad_index("rope_kv_write", "plain", "positions", 0, 50),
    *bad_index("rope_kv_write", "plain", "kv_slots", -1, 20),
    *bad_index("rope_kv_write", "plain", "kv_slots", -1, 20, row=0),
    *bad_index("paged_attention", "decode", "block_tables", 0, 9, row=(2, 2)),
    *bad_index("paged_attention", "window", "block_tables", 0, 11, row=(0, 3)),
    *bad_index("take_rows", "few", "index", 0, 23),
    *bad_index("sample", "drawn", "forced", -1, 131),
    *(bad_lengths("kv_lens", row, value) for row in (0, 2) for value in (17, 0, -1, 2**31 - 1)),
    bad_lengths("q_indptr", 0, -1),
    bad_lengths("q_indptr", 3, 4),
    bad_lengths("q_indptr", 1, 3),
    bad_lengths("q_indptr", 2, 0),
    bad_lengths("q_indptr", 2, 2**31 - 1),
]


@pytest.mark.parametrize(("op", "case", "change", "message"), BAD)
def test_an_index_out_of_range_is_an_error_before_anything_is_written(
    op, case, change, message, monkeypatch
):
    fresh = []
    module = importlib.import_module(f"fssa_kernels.ops.{op}.native_impl")
    allocate = module.empty

    def remember(*args):
        fresh.append(allocate(*args).fill_(77))
        return fresh[-1]

    monkeypatch.setattr(module, "empty", remember)
    inputs = by_name(op, case)
    for name in ("k_cache", "v_cache"):
        if op == "rope_kv_write":
            inputs[name].fill_(77)
            fresh.append(inputs[name])
    change(inputs)
    with pytest.raises(ValueError, match=message):
        getattr(fssa_kernels, op)(**inputs, backend="native")
    assert fresh
    assert all((tensor == 77).all() for tensor in fresh)


@pytest.mark.parametrize("value", [-1, 70])
def test_an_index_outside_a_packed_table_is_an_error(value):
    table = pack_matrix(torch.zeros(70, 5))
    with pytest.raises(ValueError, match=rf"index: expected values in \[0, 70\), got {value}"):
        take_rows(table, torch.tensor([0, value], dtype=torch.int32))


@pytest.mark.parametrize("op", ["modulated_linear", "residual_film_rms_norm"])
def test_a_table_of_no_users_has_no_slot(op):
    inputs = by_name(op, "gated" if op == "modulated_linear" else "film")
    inputs["rows"] = inputs["rows"][:0].clone()
    inputs["slots"].zero_()
    with pytest.raises(ValueError, match=r"slots: expected values in \[0, 0\), got 0 at row 0"):
        getattr(fssa_kernels, op)(**inputs, backend="native")


def test_slots_past_the_last_row_of_a_request_may_hold_anything():
    """What is checked is what is read: pages beyond a length, and before a window, are not."""
    inputs = by_name("paged_attention", "window")
    expected = paged_attention(**inputs, backend="native")
    inputs["block_tables"][0, 0] = inputs["block_tables"][0, 1] = -7  # 3 queries from 14 - 3 - 3
    inputs["block_tables"][:, -1] = 2**31 - 1
    assert torch.equal(paged_attention(**inputs, backend="native"), expected)


@pytest.mark.parametrize(
    ("op", "name", "reason"),
    [
        ("rope_kv_write", "k_cache", "k_cache is not contiguous"),
        ("rope_kv_write", "cos_sin", "cos_sin is not contiguous"),
        ("paged_attention", "v_cache", "v_cache is not contiguous"),
        ("paged_attention", "kv_lens", "the last dimension of kv_lens is not contiguous"),
        ("take_rows", "table", "the last dimension of table is not contiguous"),
        ("sample", "uniform", "the last dimension of uniform is not contiguous"),
        ("residual_film_rms_norm", "x", "the last dimension of x is not contiguous"),
    ],
)
def test_what_it_cannot_serve_is_refused_when_named_and_served_otherwise(op, name, reason):
    inputs = by_name(op, cases(op)[0].name)
    expected = run(op, inputs, "reference")
    inputs[name] = torch.stack([inputs[name], inputs[name]], dim=-1)[..., 0]
    with pytest.raises(ValueError, match=rf"{op}: backend 'native' cannot serve.*{reason}"):
        run(op, inputs)
    for got, right in zip(run(op, inputs, "auto"), expected, strict=True):
        torch.testing.assert_close(got, right, equal_nan=True)


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
