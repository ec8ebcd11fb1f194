import importlib.util

import pytest
import torch

from fssa_kernels import explain, modulated_linear, native, paged_attention
from fssa_kernels.dispatch import Backend, judge, select
from fssa_kernels.native import NATIVE
from fssa_kernels.testing import OPS, cases


def backend(name, cannot=None, avoid=None):
    return Backend(name, lambda x: (name, x), lambda x: cannot, lambda x: avoid)


ABLE = backend("able")
UNABLE = backend("unable", cannot="no GPU")
SLOW = backend("slow", avoid="2x")
SLOWER = backend("slower", avoid="3x")
LAST = backend("last")


@pytest.mark.parametrize(
    ("backends", "name", "chosen"),
    [
        ([ABLE, LAST], "auto", "able"),
        ([UNABLE, ABLE, LAST], "auto", "able"),
        ([SLOW, LAST], "auto", "last"),
        ([UNABLE, SLOW], "auto", "slow"),  # slower, but there is nobody else
        ([SLOW, SLOWER], "auto", "slow"),
        ([ABLE, LAST], "last", "last"),
        ([SLOW, LAST], "slow", "slow"),  # avoided by auto only
    ],
)
def test_select(backends, name, chosen):
    assert select("op", backends, name, [1]).run(1) == (chosen, 1)
    assert [v.backend for v in judge("op", backends, name, [1]) if v.chosen] == [chosen]


def test_a_named_backend_that_cannot_serve_raises_with_its_reason():
    with pytest.raises(ValueError, match="op: backend 'unable' cannot serve this call: no GPU"):
        select("op", [UNABLE, LAST], "unable", [1])


def test_nobody_can_serve():
    with pytest.raises(ValueError, match="op: no backend supports these inputs: unable: no GPU"):
        select("op", [UNABLE], "auto", [1])
    assert [v.chosen for v in judge("op", [UNABLE], "auto", [1])] == [False]


@pytest.mark.parametrize("function", [select, judge])
def test_unknown_backend(function):
    with pytest.raises(ValueError, match="backend: expected one of auto, able, last, got 'x'"):
        function("op", [ABLE, LAST], "x", [1])


def test_verdicts_say_why():
    def reasons(backends, name="auto"):
        return [v.reason for v in judge("op", backends, name, [1])]

    assert reasons([UNABLE, SLOW, ABLE, LAST]) == [
        "cannot: no GPU",
        "can, but auto prefers another: 2x",
        "the first that supports these inputs",
        "can, but 'able' comes first",
    ]
    assert reasons([SLOW]) == ["the only one that can, though: 2x"]
    assert reasons([ABLE, LAST], "last") == [
        "can, but the caller named 'last'",
        "named by the caller",
    ]
    assert str(judge("op", [UNABLE], "auto", [1])[0]) == "unable: not chosen: cannot: no GPU"


def inputs_of(name, dtype):
    case = next(c for c in cases("modulated_linear") if c.name == name)
    return case.inputs(dtype)


def test_explain_tells_what_the_native_kernel_cannot():
    inputs = inputs_of("gated", torch.float64)
    native, *_, reference = explain(modulated_linear, **inputs)
    assert not native.can
    if NATIVE is not None:
        assert "float64" in native.reason
    assert reference.chosen
    # Reported, where calling raises.
    native, *_, reference = explain("modulated_linear", **inputs, backend="native")
    assert not native.chosen
    assert not reference.chosen
    with pytest.raises(ValueError, match="cannot serve"):
        modulated_linear(**inputs, backend="native")


def test_explain_agrees_with_what_runs():
    for case in cases("modulated_linear"):
        inputs = case.inputs(torch.bfloat16)
        chosen = next(v.backend for v in explain(modulated_linear, **inputs) if v.chosen)
        expected = modulated_linear(**inputs, backend=chosen)
        assert torch.equal(modulated_linear(**inputs), expected)


def test_a_missing_native_module_is_a_reason_not_a_silence(monkeypatch):
    monkeypatch.setattr(native, "NATIVE", None)
    monkeypatch.setattr(native, "MISSING", "it was not built")
    inputs = inputs_of("gated", torch.float32)
    verdict, *_, reference = explain(modulated_linear, **inputs)
    assert verdict.reason == "cannot: it was not built"
    assert reference.chosen
    assert modulated_linear(**inputs).isfinite().all()
    with pytest.raises(ValueError, match="'native' cannot serve this call: it was not built"):
        modulated_linear(**inputs, backend="native")


def test_explain_tells_what_triton_needs(monkeypatch):
    inputs = inputs_of("gated", torch.float32)

    def reason():
        verdict = explain(modulated_linear, **inputs)[1]
        assert (verdict.backend, verdict.can) == ("triton", False)
        return verdict.reason

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "on the CPU, the kernels run on a GPU" in reason()
    inputs = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in inputs.items()}
    expected = "no memory" if importlib.util.find_spec("triton") else "pip install 'fssa[gpu]'"
    assert expected in reason()


def test_explain_checks_like_the_op():
    inputs = cases("paged_attention")[0].inputs(torch.float32)
    with pytest.raises(ValueError, match=r"modulated_linear: x: expected shape \[T, K\]"):
        explain(modulated_linear, torch.zeros(3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="op: expected one of advance_step"):
        explain("matmul")
    with pytest.raises(
        ValueError, match=r"backend: expected one of auto, native, triton, .*reference, got 'gpu'"
    ):
        explain(paged_attention, **inputs, backend="gpu")


@pytest.mark.parametrize("op", OPS)
def test_every_op_ends_with_its_reference(op):
    for case in cases(op):
        last = explain(op, **case.inputs(torch.float32))[-1]
        assert last.backend == "reference"
        assert last.can
