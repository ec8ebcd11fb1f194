"""The CUDA kernel of attention over pages, run on a CPU, against fp64 and PyTorch."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fssa_kernels import explain, paged_attention
from fssa_kernels.cuda.backend import NOT_MEASURED
from fssa_kernels.cuda.module import emulating
from fssa_kernels.gpu.device import Device
from fssa_kernels.testing import cases, within_wider
from tests.kernels.accuracy import check_as_good_as_torch, make, same_bits
from tests.kernels.cuda_emulation import DEVICES, device, emulated  # noqa: F401

OP = "paged_attention"
HALF = [torch.bfloat16, torch.float16]
# A split holds 128 keys: requests of less, of just so many, and of several splits.
REQUESTS = {
    "short": ((1, 9), (1, 1), (1, 17)),
    "long": ((1, 300), (1, 128), (0, 40), (1, 129), (1, 257)),
    "chunks": ((3, 150), (1, 6), (5, 5), (0, 0)),
}
HEADS = {
    "one": dict(num_heads=2, num_kv_heads=2, head_dim=64),
    "three": dict(num_heads=6, num_kv_heads=2, head_dim=128),
    "nine": dict(num_heads=9, num_kv_heads=1, head_dim=64),
    "sixteen": dict(num_heads=16, num_kv_heads=1, head_dim=256),
}


def few_programs(emulated, **changes):  # noqa: F811
    """A device on which a block has every split of its row."""
    facts = {"name": "x", "capability": 90, "num_sms": 0, "shared_bytes": 227 << 10, **changes}
    return emulating(emulated, Device(**facts))


@pytest.mark.parametrize("window", [0, 1, 16, 140])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("requests", REQUESTS)
def test_as_good_as_torch(requests, heads, window, emulated):  # noqa: F811
    dtype = HALF[(window + len(heads)) % 2]
    sizes = dict(requests=REQUESTS[requests], page_size=16, window=window, **HEADS[heads])
    for shared in (emulating(emulated, DEVICES["sm_80"]), few_programs(emulated)):
        with shared:
            check_as_good_as_torch(OP, make(OP, dtype, **sizes), "cuda")


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_any_sizes_and_orders(data, seed, emulated):  # noqa: F811
    draw = data.draw
    lengths = st.integers(0, 270).flatmap(
        lambda n: st.tuples(st.integers(0, min(n, 3)), st.just(n))
    )
    kv_heads = draw(st.integers(1, 3))
    inputs = make(
        OP,
        draw(st.sampled_from(HALF)),
        seed,
        requests=tuple(draw(st.lists(lengths, max_size=3))),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * draw(st.integers(1, 16)),
        head_dim=draw(st.sampled_from([64, 64, 128])),
        page_size=draw(st.sampled_from([1, 3, 16, 19, 256])),
        window=draw(st.sampled_from([0, 0, 1, 30, 200])),
    )
    emulated.seed(draw(st.integers(0, 2**32)))
    with few_programs(emulated, num_sms=draw(st.integers(0, 9))):
        check_as_good_as_torch(OP, inputs, "cuda")


@pytest.mark.parametrize("heads", HEADS)
def test_how_the_work_is_shared_changes_no_bit(heads, emulated):  # noqa: F811
    sizes = dict(requests=REQUESTS["long"], page_size=16, window=200, **HEADS[heads])
    inputs = make(OP, torch.bfloat16, **sizes)
    with few_programs(emulated):
        expected = paged_attention(**inputs, backend="cuda")
    for seed, num_sms in enumerate((1, 3, 200)):
        emulated.seed(seed)
        with few_programs(emulated, num_sms=num_sms):
            assert same_bits([paged_attention(**inputs, backend="cuda")], [expected])


def test_a_request_is_the_same_alone_and_in_any_batch_and_chunk(device):  # noqa: F811
    inputs = make(
        OP,
        torch.bfloat16,
        requests=((2, 150), (1, 300)),
        page_size=16,
        num_heads=6,
        num_kv_heads=2,
        head_dim=64,
    )
    expected = paged_attention(**inputs, backend="cuda")
    alone = {**inputs, "q": inputs["q"][2:], "q_indptr": torch.tensor([0, 1], dtype=torch.int32)}
    for name in ("block_tables", "kv_lens"):
        alone[name] = inputs[name][1:]
    assert same_bits([paged_attention(**alone, backend="cuda")], [expected[2:]])
    # The first query of the first request, before its second key was there.
    first = {**inputs, "q": inputs["q"][:1], "q_indptr": torch.tensor([0, 1], dtype=torch.int32)}
    first["block_tables"] = inputs["block_tables"][:1]
    first["kv_lens"] = inputs["kv_lens"][:1] - 1
    assert same_bits([paged_attention(**first, backend="cuda")], [expected[:1]])


def test_strided_queries_and_caches_that_lie_differently(device):  # noqa: F811
    sizes = dict(requests=REQUESTS["short"], page_size=8, **HEADS["three"])
    inputs = make(OP, torch.bfloat16, **sizes)
    expected = paged_attention(**inputs, backend="cuda")
    q = torch.full((3, 6, 144), float("nan"), dtype=torch.bfloat16)
    q[:, :, 8:136] = inputs["q"]
    inputs["q"] = q[:, :, 8:136]
    # Heads before positions.
    inputs["v_cache"] = inputs["v_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    assert same_bits([paged_attention(**inputs, backend="cuda")], [expected])


def faulty(**changes):
    sizes = dict(requests=((1, 20), (2, 150), (1, 9)), page_size=16, **HEADS["three"])
    inputs = make(OP, torch.bfloat16, **sizes)
    return inputs, {**inputs, **changes}


def test_what_does_not_fit_is_nan_where_it_matters(device):  # noqa: F811
    good, _ = faulty()
    expected = paged_attention(**good, backend="cuda")

    def spoilt(**changes):
        return paged_attention(**{**good, **changes}, backend="cuda")

    for kv_lens in ([20, 10**6, 9], [20, 1, 9]):  # more than the pages hold, fewer than queries
        y = spoilt(kv_lens=torch.tensor(kv_lens, dtype=torch.int32))
        assert y[1:3].isnan().all()
        assert same_bits([y[[0, 3]]], [expected[[0, 3]]])
    for page in (-1, 10**6):
        tables = good["block_tables"].clone()
        tables[1, 2] = page
        y = spoilt(block_tables=tables)
        assert y[1:3].isnan().all()
        assert same_bits([y[[0, 3]]], [expected[[0, 3]]])
    for bounds in ([0, 1, 3, 9], [1, 1, 3, 4], [0, 3, 1, 4]):
        assert spoilt(q_indptr=torch.tensor(bounds, dtype=torch.int32)).isnan().all()
    # Rows of nobody.
    bounds = torch.tensor([0, 1, 3, 3], dtype=torch.int32)
    y = spoilt(q_indptr=bounds)
    assert torch.equal(y[3], torch.zeros_like(y[3]))
    assert same_bits([y[:3]], [expected[:3]])


def refused(**inputs):
    verdict = next(v for v in explain(OP, **inputs) if v.backend == "cuda")
    assert not verdict.can
    with pytest.raises(ValueError, match="backend 'cuda' cannot serve this call"):
        paged_attention(**inputs, backend="cuda")
    return verdict.reason


def test_what_the_kernel_cannot_take_is_named(device, emulated):  # noqa: F811
    def sized(**changes):
        sizes = dict(requests=((1, 20),), page_size=16, **HEADS["one"])
        return make(OP, torch.bfloat16, **{**sizes, **changes})

    assert "heads 64, 128 or 256 wide, got 96" in refused(**sized(head_dim=96))
    many = sized(num_heads=34)
    assert "at most 16 heads that share a KV head, got 17" in refused(**many)
    long = sized(requests=((257, 257),))
    assert "at most 256 rows of q, got 257" in refused(**long)
    assert "float32" in refused(**make(OP, torch.float32, requests=((1, 20),), **HEADS["one"]))
    shifted = sized()
    shifted["q"] = within_wider(shifted["q"].flatten(1)).view(1, 2, 64)
    assert "rows of q are not at multiples of 16 bytes" in refused(**shifted)
    with emulating(emulated, DEVICES["sm_86"]):
        wide = sized(num_heads=2, head_dim=256)
        assert "bytes of shared memory for a block, got 101376" in refused(**wide)


def test_auto_passes_the_kernel_over_and_says_so(device):  # noqa: F811
    inputs = make(OP, torch.bfloat16, requests=((1, 20),), **HEADS["one"])
    verdict = next(v for v in explain(OP, **inputs) if v.backend == "cuda")
    assert verdict.can
    assert not verdict.chosen
    assert NOT_MEASURED in verdict.reason


@pytest.mark.parametrize("case", cases(OP), ids=str)
def test_every_case_is_served_right_or_refused(case, device):  # noqa: F811
    inputs = case.inputs(torch.bfloat16)
    verdict = next(v for v in explain(OP, **inputs) if v.backend == "cuda")
    assert verdict.can or inputs["q"].shape[2] not in (64, 128, 256)
