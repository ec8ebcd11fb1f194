"""The operators as torch sees them: opcheck, autograd, compile, export, dispatch modes."""

import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import fssa_kernels
from fssa_kernels.dispatch import lookup
from fssa_kernels.native import NATIVE
from fssa_kernels.testing import OPS, cases

CASES = [case for op in OPS for case in cases(op)]


def operator(op):
    return getattr(torch.ops.fssa, op).default


def with_grad(case, dtype=torch.float32):
    inputs = case.inputs(dtype)
    for name in case.differentiable:
        inputs[name].requires_grad_()
    return inputs


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case):
    opcheck(operator(case.op), lookup(case.op).prepare(**case.inputs(torch.float32)))


@pytest.mark.parametrize("case", [c for c in CASES if c.differentiable], ids=str)
def test_opcheck_with_gradients(case):
    inputs = with_grad(case)
    if case.op == "modulated_linear":
        inputs["epilogue"] = "none"  # under grad the public function composes it after the op
    opcheck(operator(case.op), lookup(case.op).prepare(**inputs))


class Seen(TorchDispatchMode):
    """Records the calls of operators underneath, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def backward_calls(case):
    """The calls of gradient operators that one backward pass makes."""
    outputs = as_tuple(case.run(with_grad(case, torch.bfloat16)))  # its fp32 sides stay fp32
    with Seen() as seen:
        torch.autograd.backward(sum(output.square().sum() for output in outputs))
    return [(f, args) for f, args in seen.calls if f.namespace == "fssa"]


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.differentiable and c.op != "expand_modulation"], ids=str
)
def test_opcheck_of_the_gradient_operator(case):
    calls = backward_calls(case)
    assert len(calls) == 1
    function, args = calls[0]
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    opcheck(function, args, test_utils=("test_schema", "test_faketensor"))


def permuted(value):
    """A floating tensor in memory the other way round, as a transposed one is."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 2:
        return value
    return value.detach().transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fakes_are_right_for_permuted_inputs(case):
    inputs = {name: permuted(value) for name, value in case.inputs(torch.float32).items()}
    args = lookup(case.op).prepare(**inputs)
    opcheck(operator(case.op), args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.differentiable and c.op != "expand_modulation"], ids=str
)
def test_fakes_of_gradient_operators_are_right_for_permuted_inputs(case):
    ((function, args),) = backward_calls(case)
    args = [permuted(a) for a in args]
    opcheck(function, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op", OPS)
def test_a_dispatch_mode_sees_the_operator(op):
    case = cases(op)[0]
    inputs = case.inputs(torch.float32)
    with Seen() as seen, torch.no_grad():
        case.run(inputs)
    assert str(seen.calls[0][0]) == f"fssa.{op}.default"


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors_go_through_the_fake(op):
    case = cases(op)[0]
    inputs = case.inputs(torch.float32)
    real = case.run(case.inputs(torch.float32))
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
    fake = case.run(fakes)  # outside the mode: the tensors alone must tell
    if real is None:
        assert fake is None
        return
    for got, expected in zip(as_tuple(fake), as_tuple(real), strict=True):
        assert isinstance(got, torch._subclasses.FakeTensor)
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("op", OPS)
def test_eager_calls_without_gradients_bypass_the_registration(monkeypatch, op, context):
    def refuse(*args):
        raise AssertionError("went through the registration")

    monkeypatch.setattr(sys.modules[f"fssa_kernels.ops.{op}.api"]._OP, "registered", refuse)
    case = cases(op)[0]
    inputs = case.inputs(torch.float32)
    with context():
        case.run(inputs)
    if case.differentiable:
        with pytest.raises(AssertionError, match="went through"):
            case.run(with_grad(case))


class Call(torch.nn.Module):
    """An op as a module: its tensors are arguments, the rest is fixed."""

    def __init__(self, case, inputs):
        super().__init__()
        self.case = case
        self.fixed = {k: v for k, v in inputs.items() if not isinstance(v, torch.Tensor)}
        self.names = [k for k, v in inputs.items() if isinstance(v, torch.Tensor)]

    def forward(self, *tensors):
        named = dict(zip(self.names, tensors, strict=True))
        return self.case.run({**self.fixed, **named})

    def tensors(self, inputs):
        return [inputs[name] for name in self.names]


# One case of each op that exercises most of its arguments: tracing costs seconds.
TRACED = [
    next(c for c in cases(op) if c.name == name)
    for op, name in (
        ("modulated_linear", "gated-silu"),
        ("residual_film_rms_norm", "film"),
        ("rope_kv_write", "strided"),
        ("paged_attention", "chunks-and-decode"),
        ("expand_modulation", "several"),
    )
]


@pytest.mark.parametrize("case", TRACED, ids=str)
def test_compiles_into_one_graph(case):
    torch._dynamo.reset()
    inputs, again = case.inputs(torch.float32), case.inputs(torch.float32)
    call = Call(case, inputs)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        got = compiled(*call.tensors(inputs))
        expected = call(*call.tensors(again))
    for g, e in zip(as_tuple(got), as_tuple(expected), strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=0)
    for name in call.names:  # what it writes in place, too
        torch.testing.assert_close(inputs[name], again[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", [c for c in TRACED if c.differentiable], ids=str)
def test_compiled_gradients_are_those_of_eager(case):
    torch._dynamo.reset()
    inputs = with_grad(case)
    call = Call(case, inputs)
    wanted = [inputs[name] for name in case.differentiable]

    def gradients(function):
        outputs = as_tuple(function(*call.tensors(inputs)))
        return torch.autograd.grad(sum(o.square().sum() for o in outputs), wanted)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for g, e in zip(gradients(compiled), gradients(call), strict=True):
        assert e.abs().max() > 0
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("case", TRACED, ids=str)
def test_exports_as_one_operator(case):
    inputs = case.inputs(torch.float32)
    call = Call(case, inputs)
    with torch.no_grad():
        program = torch.export.export(call, tuple(call.tensors(inputs)))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert f"fssa.{case.op}.default" in names
    with torch.no_grad():
        got = program.module()(*call.tensors(case.inputs(torch.float32)))
        expected = call(*call.tensors(case.inputs(torch.float32)))
    for g, e in zip(as_tuple(got), as_tuple(expected), strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("case", "grad"),
    [(c, grad) for c in TRACED for grad in (False, True) if c.differentiable or not grad],
    ids=str,
)
def test_autocast_changes_nothing(case, grad):
    expected = case.run(case.inputs(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.run(with_grad(case) if grad else case.inputs(torch.float32))
    for g, e in zip(as_tuple(got), as_tuple(expected), strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g.detach(), e)


def test_compiles_for_any_number_of_tokens_and_features():
    torch._dynamo.reset()
    case = TRACED[0]
    inputs = case.inputs(torch.float32)
    call = Call(case, inputs)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for num_tokens in (5, 4, 3):
        inputs["x"], inputs["slots"] = inputs["x"][:num_tokens], inputs["slots"][:num_tokens]
        tensors = call.tensors(inputs)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*tensors), call(*tensors), rtol=0, atol=0)


@pytest.mark.parametrize("case", [c for c in CASES if c.differentiable], ids=str)
def test_forward_mode_derivatives_are_those_of_backward(case):
    """For every input, w . J v taken in either order."""
    inputs = with_grad(case, torch.float64)
    outputs = as_tuple(case.run(inputs))
    weights = [torch.randn_like(o) for o in outputs]
    wanted = [inputs[name] for name in case.differentiable]
    gradients = torch.autograd.grad(outputs, wanted, weights, materialize_grads=True)
    for name, gradient in zip(case.differentiable, gradients, strict=True):
        plain = case.inputs(torch.float64)
        direction = torch.randn_like(plain[name])
        with forward_ad.dual_level():
            plain[name] = forward_ad.make_dual(plain[name], direction)
            tangents = [forward_ad.unpack_dual(o).tangent for o in as_tuple(case.run(plain))]
        got = [(w * t).sum() for w, t in zip(weights, tangents, strict=True) if t is not None]
        torch.testing.assert_close(sum(got, torch.zeros(())).double(), (gradient * direction).sum())


@pytest.mark.parametrize("case", [c for c in TRACED if c.differentiable], ids=str)
def test_where_a_kernel_would_drop_a_tangent_the_reference_serves(case):
    inputs = case.inputs(torch.float32)
    values = inputs[case.differentiable[0]]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(values, torch.randn_like(values))
        inputs[case.differentiable[0]] = dual
        got, expected = (
            forward_ad.unpack_dual(as_tuple(case.run(inputs, backend=backend))[0]).tangent
            for backend in ("auto", "reference")
        )
    assert got.abs().max() > 0
    assert torch.equal(got, expected)


def test_a_kernel_and_a_packed_matrix_refuse_a_tangent():
    case = TRACED[0]
    inputs = case.inputs(torch.float32)
    with forward_ad.dual_level():
        inputs["x"] = forward_ad.make_dual(inputs["x"], torch.ones_like(inputs["x"]))
        with pytest.raises(NotImplementedError, match="'triton' has no forward-mode"):
            case.run(inputs, backend="triton")
        if NATIVE is not None:
            packed = fssa_kernels.pack_matrix(torch.zeros(8, inputs["x"].shape[1]))
            with pytest.raises(RuntimeError, match="got a packed matrix"):
                fssa_kernels.modulated_linear(inputs["x"], packed)


def test_the_operator_itself_has_no_gradient_through_its_epilogue():
    case = next(c for c in cases("modulated_linear") if c.name == "gated-silu")
    args = lookup("modulated_linear").prepare(**with_grad(case))
    with pytest.raises(RuntimeError, match="no gradient through its epilogue"):
        operator("modulated_linear")(*args)


def test_import_brings_no_triton_and_touches_no_gpu():
    code = (
        "import sys, fssa_kernels, torch; "
        "assert 'triton' not in sys.modules; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_public_names():
    memory = {"PackArena", "PackedMatrix", "extend_weight", "pack_matrix", "zeros_on_huge_pages"}
    assert set(fssa_kernels.__all__) == {*OPS, *memory, "StepGraph", "Following", "explain"}
    assert all(callable(getattr(fssa_kernels, name)) for name in fssa_kernels.__all__)
