"""Paged attention on a GPU's kernels: the bits of a row, whoever else is in the batch."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from fssa_kernels.ops.paged_attention import triton_impl
from fssa_kernels.testing import cases
from tests.kernels.accuracy import by_name, check_as_good_as_torch, make, run, same_bits

DTYPES = [torch.float32, torch.bfloat16]
# As (queries, cached length): decodes, a whole prompt, and a chunk of one.
MIXED = ((1, 75), (25, 25), (0, 9), (9, 90), (1, 1))
# Heads so wide that the blocks of keys are of 32, two to a split.
SIZES = dict(num_heads=3, num_kv_heads=1, head_dim=66, page_size=5)


@pytest.fixture(params=["one program", "many programs"])
def programs(request, monkeypatch):
    """Splits short enough that there are several, merged in one program or in a second kernel."""
    monkeypatch.setattr(triton_impl, "KEYS_PER_SPLIT", 64)
    if request.param == "one program":
        monkeypatch.setattr(triton_impl, "MAX_SCRATCH_BYTES", 0)
    else:
        monkeypatch.setattr(triton_impl, "PROGRAMS_PER_SM", 10)
    return request.param


def attend(inputs):
    return run("paged_attention", inputs, "triton")[0]


def of_request(inputs, b):
    """The inputs of one request of a batch."""
    start, stop = inputs["q_indptr"][b : b + 2].tolist()
    return {
        **inputs,
        "q": inputs["q"][start:stop],
        "block_tables": inputs["block_tables"][b : b + 1],
        "kv_lens": inputs["kv_lens"][b : b + 1],
        "q_indptr": torch.tensor([0, stop - start], dtype=torch.int32),
    }


@pytest.mark.parametrize(
    ("dtype", "window"), [(torch.float32, 50), (torch.bfloat16, 0), (torch.float16, 50)], ids=str
)
def test_several_splits_are_as_good_as_torch(programs, dtype, window):
    inputs = make("paged_attention", dtype, requests=MIXED, window=window, **SIZES)
    check_as_good_as_torch("paged_attention", inputs, "triton")


@pytest.mark.parametrize("window", [0, 50])
def test_one_program_or_many_give_the_same_bits(monkeypatch, window):
    monkeypatch.setattr(triton_impl, "KEYS_PER_SPLIT", 64)
    inputs = make("paged_attention", torch.bfloat16, requests=MIXED, window=window, **SIZES)
    outs = []
    for max_scratch, per_sm in ((0, 1), (1 << 30, 10), (1 << 30, 0.3)):
        monkeypatch.setattr(triton_impl, "MAX_SCRATCH_BYTES", max_scratch)
        monkeypatch.setattr(triton_impl, "PROGRAMS_PER_SM", per_sm)
        outs.append(attend(inputs))
    assert same_bits(outs[:1] * 2, outs[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_request_is_bitwise_the_same_in_any_batch(programs, dtype):
    inputs = make("paged_attention", dtype, requests=MIXED, **SIZES)
    whole = attend(inputs)
    bounds = inputs["q_indptr"].tolist()
    for b, (start, stop) in enumerate(pairwise(bounds)):
        assert same_bits([attend(of_request(inputs, b))], [whole[start:stop]])
    decodes = [b for b, (n, _) in enumerate(MIXED) if n == 1]
    pure = {
        **inputs,
        "q": torch.cat([of_request(inputs, b)["q"] for b in decodes]),
        "block_tables": inputs["block_tables"][decodes],
        "kv_lens": inputs["kv_lens"][decodes],
        "q_indptr": torch.arange(len(decodes) + 1, dtype=torch.int32),
    }
    assert same_bits([attend(pure)], [torch.cat([whole[bounds[b]][None] for b in decodes])])


@pytest.mark.parametrize(("window", "chunks"), [(0, (33, 33, 23, 1)), (30, (1, 1, 88))], ids=str)
def test_chunks_of_a_prompt_give_the_bits_of_the_whole(programs, window, chunks):
    inputs = make("paged_attention", torch.bfloat16, requests=((90, 90),), window=window, **SIZES)
    whole = attend(inputs)
    stop = 0
    for size in chunks:
        start, stop = stop, stop + size
        step = {
            **inputs,
            "q": inputs["q"][start:stop],
            "kv_lens": torch.tensor([stop], dtype=torch.int32),
            "q_indptr": torch.tensor([0, size], dtype=torch.int32),
        }
        assert same_bits([attend(step)], [whole[start:stop]])


@pytest.mark.parametrize("position", [7, 89])
def test_what_lies_beyond_a_length_or_before_a_window_changes_nothing(programs, position):
    """Entries outside of a request's view may hold anything, as may the table beyond its pages."""
    requests = ((1, position + 1), (3, 20))
    inputs = make("paged_attention", torch.bfloat16, requests=requests, window=6, **SIZES)
    expected = attend(inputs)
    assert expected.isfinite().all()
    begin = position - 6 + 1
    table = inputs["block_tables"][0]
    for j in range(begin):  # what the window has passed
        page = int(table[j // 5])
        inputs["k_cache"][page, j % 5] = inputs["v_cache"][page, j % 5] = float("nan")
    table[: begin // 5] = 10**6
    table[position // 5 + 1 :] = -7
    assert same_bits([attend(inputs)], [expected])


def test_rows_of_no_request_are_zero(programs):
    inputs = make("paged_attention", torch.bfloat16, requests=MIXED, **SIZES)
    expected = F.pad(attend(inputs), (0, 0, 0, 0, 0, 70))
    inputs["q"] = torch.cat([inputs["q"], torch.full((70, 3, 66), float("nan")).bfloat16()])
    assert same_bits([attend(inputs)], [expected])
    alone = {
        **inputs,
        "kv_lens": torch.zeros(5, dtype=torch.int32),
        "q_indptr": torch.zeros(6).int(),
    }
    assert not attend(alone).any()


def check_spoiled(inputs, expected, spoiled):
    """NaN in the rows spoiled, elsewhere the bits expected."""
    got = attend(inputs)
    sound = [row for row in range(len(got)) if row not in spoiled]
    assert got[list(spoiled)].isnan().all()
    assert same_bits([got[sound]], [expected[sound]])


# The queries of request 1 stand at positions 80..89, of pages of 5.
@pytest.mark.parametrize(("entry", "page", "first"), [(0, -1, 1), (16, 10**6, 1), (17, -7, 6)])
def test_a_page_that_does_not_exist_spoils_the_rows_that_see_it(programs, entry, page, first):
    requests = ((1, 75), (10, 90), (2, 4))
    inputs = make("paged_attention", torch.bfloat16, requests=requests, **SIZES)
    expected = attend(inputs)
    inputs["block_tables"][1, entry] = page
    check_spoiled(inputs, expected, range(first, 11))


@pytest.mark.parametrize("kv_len", [-1, 9, 10**6, 2**31 - 1])
def test_a_length_that_does_not_fit_spoils_its_request(programs, kv_len):
    requests = ((1, 75), (10, 90), (2, 4))
    inputs = make("paged_attention", torch.bfloat16, requests=requests, **SIZES)
    expected = attend(inputs)
    inputs["kv_lens"][1] = kv_len
    check_spoiled(inputs, expected, range(1, 11))


@pytest.mark.parametrize(
    "bounds", [(0, 1, 11, 99), (0, 1, 11, 10), (1, 2, 11, 13), (0, -5, 11, 13), (0, 99, 11, 13)]
)
def test_bounds_that_do_not_fit_spoil_everything(programs, bounds):
    requests = ((1, 75), (10, 90), (2, 4))
    inputs = make("paged_attention", torch.bfloat16, requests=requests, **SIZES)
    inputs["q_indptr"] = torch.tensor(bounds, dtype=torch.int32)
    assert attend(inputs).isnan().all()


@pytest.mark.parametrize("num_requests", [127, 128, 258])
def test_many_requests(num_requests):
    """More bounds than the kernels read at a time."""
    requests = tuple((int(b % 10 == 7), 1 + b % 7) for b in range(num_requests))
    inputs = make("paged_attention", torch.bfloat16, requests=requests, **SIZES)
    check_as_good_as_torch("paged_attention", inputs, "triton")


def test_caches_of_other_strides():
    inputs = by_name("paged_attention", "chunks-and-decode")
    expected = attend(inputs)
    inputs["k_cache"] = torch.stack([inputs["k_cache"]] * 3, dim=1)[:, 1]
    assert same_bits([attend(inputs)], [expected])
    inputs["v_cache"] = inputs["v_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    assert same_bits([attend(inputs)], [expected])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases("paged_attention"), ids=str)
def test_torch_fused_attention_is_as_good_as_the_reference(case, dtype):
    check_as_good_as_torch("paged_attention", case.inputs(dtype), "sdpa")
