import pytest
import torch

from fssa_kernels import expand_modulation
from fssa_kernels.testing import cases

CASES = cases("expand_modulation")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_sum_written_out(case, dtype):
    inputs = case.inputs(dtype)
    z, weight, bias = inputs["z"], inputs["weight"], inputs["bias"]
    rows = expand_modulation(**inputs)
    assert rows.dtype == z.dtype
    expected = (z.double().unsqueeze(1) * weight.double()).sum(2) + bias.double()
    torch.testing.assert_close(rows.double(), expected, **case.tolerance(z.dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case):
    inputs = case.inputs(torch.float64)
    tensors = [inputs[name].requires_grad_() for name in case.differentiable]
    assert torch.autograd.gradcheck(expand_modulation, tensors)


@pytest.mark.parametrize("needed", ["z", "weight", "bias"])
def test_only_the_needed_gradient(needed):
    inputs = CASES[0].inputs(torch.bfloat16)
    inputs[needed].requires_grad_()
    expand_modulation(**inputs).square().sum().backward()
    assert inputs[needed].grad.dtype == inputs[needed].dtype
    assert all(inputs[name].grad is None for name in ("z", "weight", "bias") if name != needed)


def test_nan_in_one_latent_stays_there():
    inputs = CASES[0].inputs(torch.float32)
    inputs["z"][1] = float("nan")
    rows = expand_modulation(**inputs)
    assert rows[1].isnan().all()
    assert rows[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(z=torch.zeros(7)), ValueError, r"z: expected shape \[n, Z\]"),
        (dict(z=torch.zeros(3, 7).bfloat16()), TypeError, "z: .*float32.*bfloat16"),
        (dict(weight=torch.zeros(13, 6)), ValueError, r"weight: .*\(13, 7\).*\(13, 6\)"),
        (dict(bias=torch.zeros(12)), ValueError, r"bias: .*\(13,\).*\(12,\)"),
        (dict(bias=torch.zeros(13).int()), TypeError, "bias: .*int32"),
        (dict(backend="native"), ValueError, "backend: expected one of auto, triton, reference"),
    ],
)
def test_bad_input_names_argument_expected_and_got(change, error, message):
    inputs = CASES[0].inputs(torch.float32)
    with pytest.raises(error, match=message):
        expand_modulation(**{**inputs, **change})
