"""From one step to the next: every backend against a loop in plain Python, to the bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fssa_kernels import advance_step, explain
from fssa_kernels.native import MISSING, NATIVE
from fssa_kernels.testing import cases, written
from tests.kernels.accuracy import make, run

BACKENDS = [
    pytest.param("native", marks=pytest.mark.skipif(NATIVE is None, reason=f"native: {MISSING}")),
    "reference",
]
SIZES = st.fixed_dictionaries(
    dict(
        batch=st.integers(0, 40),
        max_steps=st.integers(1, 6),
        max_pages=st.integers(1, 5),
        page_size=st.integers(1, 7),
        num_stops=st.integers(0, 3),
        mixed=st.booleans(),
        strided=st.booleans(),
    )
)


def expected(inputs):
    """What the formula of the public function says, number by number."""
    out = {n: v.tolist() if torch.is_tensor(v) else v for n, v in inputs.items()}
    steps, page = inputs["draws"].shape[1], inputs["page_size"]
    for b, (token, logprob) in enumerate(zip(out["chosen"], out["logprobs"], strict=True)):
        i, p = out["num_done"][b], out["kv_lens"][b]
        if not (0 <= i < steps and p > 0):
            continue
        full = p >= inputs["block_tables"].shape[1] * page
        stops = [stop for stop in out["stop_tokens"][b] if stop != -1]
        out["log_tokens"][b][i], out["log_logprobs"][b][i] = token, logprob
        out["num_done"][b] = i + 1
        out["ended"][b] = int(token in stops or math.isnan(logprob) or i + 1 == steps or full)
        out["tokens"][b], out["positions"][b], out["kv_lens"][b] = token, p, p + 1
        out["uniform"][b] = out["draws"][b][min(i + 1, steps - 1)]
        table = out["block_tables"][b]
        out["kv_slots"][b] = -1 if full else table[p // page] * page + p % page
    return [torch.tensor(out[name], dtype=inputs[name].dtype) for name in written("advance_step")]


def check(inputs, backend):
    got = run("advance_step", inputs, backend)
    for name, value, right in zip(written("advance_step"), got, expected(inputs), strict=True):
        right = right.view(value.shape)
        assert torch.equal(value.nan_to_num(77), right.nan_to_num(77)), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases("advance_step"), ids=str)
def test_every_case(case, backend):
    check(case.inputs(torch.float32), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=SIZES, extra=st.integers(0, 3), seed=st.integers(0, 2**16))
def test_any_sizes(backend, sizes, extra, seed):
    check(
        make("advance_step", torch.float32, seed, num_tokens=sizes["batch"] + extra, **sizes),
        backend,
    )


@pytest.mark.skipif(NATIVE is None, reason=str(MISSING))
@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_any_number_of_threads(num_threads):
    torch.set_num_threads(num_threads)
    for case in cases("advance_step"):
        check(case.inputs(torch.float32), "native")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("argument", "value"), [("num_done", -1), ("num_done", 4), ("kv_lens", 0), ("kv_lens", -3)]
)
def test_rows_whose_numbers_make_no_sense_stay_as_they_are(backend, argument, value):
    inputs = make("advance_step", torch.float32)
    inputs[argument][2] = value
    before = [inputs[name][2].clone() for name in written("advance_step")]
    check(inputs, backend)
    after = run("advance_step", inputs, backend)
    assert all(torch.equal(a[2], b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_stop_token_is_none_of_them(backend):
    """-1 fills the row of stop tokens up; a token of that number, which is none, stops nobody."""
    inputs = make("advance_step", torch.float32, max_steps=8)
    inputs["chosen"].fill_(-1)
    inputs["stop_tokens"].fill_(-1)
    inputs["num_done"].zero_()
    inputs["kv_lens"].fill_(2)
    ended = run("advance_step", inputs, backend)[-1]
    assert not ended.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(chosen=torch.zeros(5)), TypeError, "chosen: expected dtype torch.int32"),
        (dict(chosen=3), TypeError, "chosen: expected a tensor, got int"),
        (dict(logprobs=torch.zeros(4)), ValueError, r"logprobs: expected shape \(5,\)"),
        (
            dict(tokens=torch.zeros(4, dtype=torch.int32)),
            ValueError,
            "tokens: expected at least the 5 of the batch, got 4",
        ),
        (dict(draws=torch.zeros(5, 0)), ValueError, "draws: expected at least one column"),
        (
            dict(block_tables=torch.zeros(5, 0, dtype=torch.int32)),
            ValueError,
            "block_tables: expected at least one column",
        ),
        (dict(draws=torch.zeros(5)), ValueError, r"draws: expected shape \[B, N\]"),
        (dict(log_tokens=torch.zeros(5, 4)), TypeError, "log_tokens: expected dtype torch.int32"),
        (dict(ended=torch.zeros(6, dtype=torch.int32)), ValueError, "ended: expected shape"),
        (dict(page_size=0), ValueError, "page_size: expected at least 1, got 0"),
        (dict(backend="gpu"), ValueError, "backend: expected one of auto, native, reference"),
    ],
)
def test_bad_input_is_an_error_and_nothing_is_written(change, error, message):
    inputs = make("advance_step", torch.float32)
    before = {name: inputs[name].clone() for name in written("advance_step")}
    with pytest.raises(error, match=f"advance_step: {message}"):
        advance_step(**{**inputs, **change})
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


@pytest.mark.skipif(NATIVE is None, reason=str(MISSING))
def test_the_native_kernel_says_what_it_does_not_take():
    inputs = make("advance_step", torch.float32)
    inputs["draws"] = torch.rand(4, 5).t()
    verdict = explain("advance_step", **inputs)[0]
    assert verdict.reason == (
        "cannot: the last dimension of draws is not contiguous (strides (1, 5))"
    )
    check(inputs, "auto")
