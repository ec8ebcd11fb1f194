import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fssa_kernels import checks, paged_attention
from fssa_kernels.ops.paged_attention.cases import _Sizes
from fssa_kernels.testing import cases
from tests.kernels.kernel_oracles import paged_attention_oracle

CASES = cases("paged_attention")
TOLERANCE = {
    torch.float64: dict(rtol=1e-12, atol=1e-12),
    torch.float32: dict(rtol=1e-5, atol=1e-6),
    torch.bfloat16: dict(rtol=1.01 * 2**-8, atol=1e-5),  # fp32 inside, rounded once
}


def by_name(name):
    return next(case for case in CASES if case.name == name)


def check(inputs, dtype):
    out = paged_attention(**inputs)
    assert out.dtype == dtype
    # The caches hold NaN wherever no request has a key: past a length, and in spare pages.
    assert inputs["k_cache"].isnan().any()
    torch.testing.assert_close(out.double(), paged_attention_oracle(**inputs), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_dense_attention(case, dtype):
    check(case.inputs(dtype), dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    requests=st.lists(
        st.integers(0, 11).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), max_size=4
    ).map(tuple),
    num_kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    page_size=st.integers(1, 5),
    window=st.integers(0, 12),
    seed=st.integers(0, 2**16),
)
def test_any_sizes_match_dense_attention(num_kv_heads, groups, seed, **sizes):
    made = _Sizes(num_heads=num_kv_heads * groups, num_kv_heads=num_kv_heads, **sizes)
    check(made.make(torch.Generator().manual_seed(seed), torch.float64), torch.float64)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("chunks", [(11,), (1,) * 11, (4, 4, 3), (10, 1)])
def test_prefill_decode_and_chunks_agree(chunks, window):
    """The queries of one request, taken in any number of steps, attend alike."""
    inputs = _Sizes(((11, 11),), window=window).make(
        torch.Generator().manual_seed(3), torch.float64
    )
    whole = paged_attention(**inputs)
    start, parts = 0, []
    for size in chunks:
        step = {
            **inputs,
            "q": inputs["q"][start : start + size],
            "kv_lens": torch.tensor([start + size], dtype=torch.int32),
            "q_indptr": torch.tensor([0, size], dtype=torch.int32),
        }
        parts.append(paged_attention(**step))
        start += size
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


def test_a_request_is_bitwise_the_same_alone():
    inputs = by_name("chunks-and-decode").inputs(torch.float32)
    whole = paged_attention(**inputs)
    bounds = inputs["q_indptr"].tolist()
    for b in range(3):
        rows = slice(bounds[b], bounds[b + 1])
        alone = {
            **inputs,
            "q": inputs["q"][rows],
            "block_tables": inputs["block_tables"][b : b + 1],
            "kv_lens": inputs["kv_lens"][b : b + 1],
            "q_indptr": torch.tensor([0, rows.stop - rows.start], dtype=torch.int32),
        }
        assert torch.equal(paged_attention(**alone), whole[rows])


def test_rows_of_no_request_are_zero():
    inputs = by_name("decode").inputs(torch.float32)
    padded = {**inputs, "q": torch.cat([inputs["q"], torch.full((2, 6, 8), float("nan"))])}
    out = paged_attention(**padded)
    assert torch.equal(out[:3], paged_attention(**inputs))
    assert torch.equal(out[3:], torch.zeros(2, 6, 8))


def test_entries_past_the_last_page_are_not_read():
    inputs = by_name("decode").inputs(torch.float32)
    expected = paged_attention(**inputs)
    num_pages = -(-inputs["kv_lens"] // 4)
    for b, used in enumerate(num_pages.tolist()):
        inputs["block_tables"][b, used:] = -7
    assert torch.equal(paged_attention(**inputs), expected)


def test_strided_queries_and_caches():
    inputs = by_name("window").inputs(torch.float32)
    expected = paged_attention(**inputs, backend="reference")
    heads = torch.cat([inputs["q"], inputs["q"]], dim=1)[:, :6]
    torch.testing.assert_close(paged_attention(**{**inputs, "q": heads}), expected)
    inputs["q"] = heads
    for name in ("k_cache", "v_cache"):
        inputs[name] = torch.stack([inputs[name], inputs[name]], dim=1)[:, 1]
    assert torch.equal(paged_attention(**inputs, backend="reference"), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case):
    inputs = case.inputs(torch.float64)
    for name in ("k_cache", "v_cache"):  # finite differences step through every element
        inputs[name].nan_to_num_(0.5)
    tensors = [inputs[name].requires_grad_() for name in case.differentiable]

    def call(q, k_cache, v_cache):
        return paged_attention(**{**inputs, "q": q, "k_cache": k_cache, "v_cache": v_cache})

    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


def test_gradients_of_shared_pages_add_up():
    """Two requests that read the same page, as after a prefix-cache hit."""
    inputs = by_name("decode").inputs(torch.float64)
    inputs["block_tables"][0, 0] = inputs["block_tables"][2, 0]
    for name in ("k_cache", "v_cache"):
        inputs[name].nan_to_num_(0.5).requires_grad_()
    wanted = [inputs["k_cache"], inputs["v_cache"]]
    got = torch.autograd.grad(paged_attention(**inputs).square().sum(), wanted)
    expected = torch.autograd.grad(paged_attention_oracle(**inputs).square().sum(), wanted)
    for grad, right in zip(got, expected, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-10, atol=1e-12)


def test_gradient_of_unread_entries_is_zero_even_where_they_hold_nan():
    inputs = by_name("chunks-and-decode").inputs(torch.float32)
    unread = inputs["k_cache"].isnan()
    for name in ("q", "k_cache", "v_cache"):
        inputs[name].requires_grad_()
    paged_attention(**inputs).square().sum().backward()
    for name in ("k_cache", "v_cache"):
        assert (inputs[name].grad[unread] == 0).all()
        assert (inputs[name].grad[~unread] != 0).any()
    assert inputs["q"].grad.isfinite().all()


@pytest.mark.parametrize("page", [-1, 10**6])
def test_where_pages_cannot_be_checked_a_request_with_one_out_of_range_is_nan(page, monkeypatch):
    monkeypatch.setattr(checks, "can_check", lambda tensor: False)
    inputs = by_name("decode").inputs(torch.float32)
    inputs["k_cache"].requires_grad_()
    expected = paged_attention(**inputs, backend="reference")
    (right,) = torch.autograd.grad(expected[1:].sum(), inputs["k_cache"], retain_graph=True)
    inputs["block_tables"] = inputs["block_tables"].clone()
    inputs["block_tables"][0, 0] = page
    out = paged_attention(**inputs, backend="reference")
    assert out[0].isnan().all()
    assert torch.equal(out[1:], expected[1:])
    mine = inputs["block_tables"][1:].unique().long()
    (got,) = torch.autograd.grad(out[1:].sum(), inputs["k_cache"])
    torch.testing.assert_close(got[mine], right[mine])


BAD = {
    "q rank": (dict(q=torch.zeros(3, 48)), ValueError, r"q: expected shape \[T, H, D\]"),
    "cache rank": (dict(k_cache=torch.zeros(4, 2, 8)), ValueError, "k_cache: expected shape"),
    "head size": (dict(q=torch.zeros(3, 6, 7)), ValueError, "k_cache: .*2, 7.*2, 8"),
    "heads": (dict(q=torch.zeros(3, 5, 8)), ValueError, "q: .*multiple of Hkv = 2.*H = 5"),
    "no query heads": (dict(q=torch.zeros(3, 0, 8)), ValueError, "q: .*one head.*got H = 0"),
    "no KV heads": (
        dict(k_cache=torch.zeros(9, 4, 0, 8), v_cache=torch.zeros(9, 4, 0, 8)),
        ValueError,
        r"k_cache: expected at least one KV head, got shape \(9, 4, 0, 8\)",
    ),
    "v dtype": (dict(v_cache=torch.zeros(8, 4, 2, 8).half()), (TypeError, ValueError), "v_cache"),
    "tables dtype": (dict(block_tables=torch.zeros(3, 4).long()), TypeError, "block_tables: "),
    "lengths": (dict(kv_lens=torch.zeros(2, dtype=torch.int32)), ValueError, r"kv_lens: .*\(3,\)"),
    "bounds": (dict(q_indptr=torch.zeros(3, dtype=torch.int32)), ValueError, r"q_indptr: .*\(4,\)"),
    "window": (dict(window=-1), ValueError, "window: expected 0 .*got -1"),
    "backend": (dict(backend="gpu"), ValueError, "backend: expected one of auto, native"),
    "longer than its pages": (
        dict(kv_lens=torch.tensor([9, 1, 99], dtype=torch.int32)),
        ValueError,
        "kv_lens of at most 16.*99",
    ),
    "more queries than keys": (
        dict(kv_lens=torch.tensor([9, 0, 12], dtype=torch.int32)),
        ValueError,
        "q_indptr.*rises",
    ),
    "bounds past q": (
        dict(q_indptr=torch.tensor([0, 1, 2, 4], dtype=torch.int32)),
        ValueError,
        "q_indptr.*at most 3",
    ),
    "falling bounds": (
        dict(q_indptr=torch.tensor([0, 2, 1, 3], dtype=torch.int32)),
        ValueError,
        "q_indptr.*rises",
    ),
    "unknown page": (
        dict(block_tables=torch.full((3, 4), 99, dtype=torch.int32)),
        ValueError,
        r"block_tables: expected values in \[0, 9\), got .*99",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_names_argument_expected_and_got(change, error, message):
    inputs = by_name("decode").inputs(torch.float32)
    with pytest.raises(error, match=message):
        paged_attention(**{**inputs, **change})
