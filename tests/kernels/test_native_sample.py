"""The native `sample`: frequencies, ties, filters, forced tokens, log-probabilities."""

import math
from pathlib import Path

import pytest
import torch

from fssa_kernels import StepGraph, sample
from fssa_kernels.native import MISSING, NATIVE
from fssa_kernels.ops.sample import reference
from fssa_kernels.testing import within_wider
from tests.kernels.accuracy import (
    same_bits,
)

pytestmark = pytest.mark.skipif(NATIVE is None, reason=str(MISSING))

DTYPES = [torch.float32, torch.bfloat16]


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


def test_where_forced_tokens_cannot_be_checked_the_reference_gives_one_out_of_range_nan(
    monkeypatch,
):
    monkeypatch.setattr(reference, "can_check", lambda tensor: False)
    chosen = settings_of(3, temperature=0.0)
    chosen["forced"] = torch.tensor([4, 7, -1], dtype=torch.int32)
    tokens, logprobs = sample(torch.randn(3, 7), **chosen, backend="reference")
    assert tokens[:2].tolist() == [4, 7]
    assert logprobs.isnan().tolist() == [False, True, False]


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


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_a_recorded_draw_allocates_nothing():
    """A failure to allocate in the middle of a team would end the process."""
    resource = pytest.importorskip("resource")
    logits = torch.zeros(1, 40_000_000, dtype=torch.bfloat16)
    chosen = settings_of(1)
    graph = StepGraph.record(
        lambda _: sample(logits, **chosen), {"rows": [logits, *chosen.values()]}
    )
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**25, before[1]))
    try:
        graph.replay(rows=1)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert graph.outputs[0].tolist() == [20_000_000]
