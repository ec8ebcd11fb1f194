"""The CUDA kernels where there is a GPU, at sizes that fill one; the same checks run emulated too.

Under a sanitizer:

    compute-sanitizer --tool memcheck python -m pytest -k "not emulated" \\
        tests/kernels/test_cuda_on_gpu.py

and likewise racecheck and synccheck.
"""

import contextlib

import pytest
import torch

from fssa_kernels.cuda.module import emulating, missing
from fssa_kernels.gpu import workspace
from tests.kernels.accuracy import FLOOR, exact, make, run, same_bits
from tests.kernels.cuda_emulation import DEVICES, emulated  # noqa: F401

HALF = [torch.bfloat16, torch.float16]
# (op, sizes, whether the sizes are for a GPU only: emulated they would take minutes)
PROBLEMS = {
    "gated": ("modulated_linear", dict(family="gated", rank=16, splits=(192, 72)), False),
    "silu": (
        "modulated_linear",
        dict(family="gated", rank=8, splits=(96, 96), epilogue="silu_mul", bias=True),
        False,
    ),
    "core": ("modulated_linear", dict(family="core", rank=16, splits=(264,)), False),
    "core-premade": ("modulated_linear", dict(family="core", rank=40, splits=(136,)), False),
    "factors": ("modulated_linear", dict(family="factors", rank=16, splits=(128, 64)), False),
    "static": ("modulated_linear", dict(family="static", rank=64, splits=(200,)), False),
    "none": ("modulated_linear", dict(family="none", splits=(72,)), False),
    "gated-large": (
        "modulated_linear",
        dict(family="gated", rank=16, splits=(4096, 1032), in_features=4104),
        True,
    ),
    "silu-large": (
        "modulated_linear",
        dict(family="core", rank=16, splits=(3000, 3000), epilogue="silu_mul", in_features=2048),
        True,
    ),
    "norm": ("residual_film_rms_norm", dict(num_channels=1032), False),
    "shrink": ("residual_film_rms_norm", dict(num_channels=520, low_rank=33), False),
    "norm-large": ("residual_film_rms_norm", dict(num_channels=8192), True),
    "shrink-large": ("residual_film_rms_norm", dict(num_channels=4096, low_rank=48), True),
    "decode": (
        "paged_attention",
        dict(
            requests=((1, 300), (1, 1), (2, 140)),
            num_heads=6,
            num_kv_heads=2,
            head_dim=128,
            page_size=16,
        ),
        False,
    ),
    "decode-window": (
        "paged_attention",
        dict(requests=((1, 290),), num_heads=16, num_kv_heads=1, head_dim=256, window=200),
        False,
    ),
    "decode-large": (
        "paged_attention",
        dict(
            requests=((1, 2000), (1, 513), (1, 64)),
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            page_size=16,
        ),
        True,
    ),
}


@pytest.fixture(params=["emulated", "gpu"])
def where(request):
    """The device that tensors are put on."""
    with contextlib.ExitStack() as stack:
        if request.param == "gpu":
            if not torch.cuda.is_available():
                pytest.skip("there is no GPU")
            if missing() is not None:
                pytest.skip(missing())
            yield torch.device("cuda", torch.cuda.current_device())
        else:
            module = request.getfixturevalue("emulated")
            stack.enter_context(emulating(module, DEVICES["sm_90"]))
            yield torch.device("cpu")


def on(device, inputs):
    def moved(value):
        if not isinstance(value, torch.Tensor) or device.type == "cpu":
            return value
        copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return copy.copy_(value)

    return {name: moved(value) for name, value in inputs.items()}


def problem(name, dtype, where, num_tokens):
    op, sizes, large = PROBLEMS[name]
    if large and where.type == "cpu":
        pytest.skip("too large to emulate")
    if op == "modulated_linear":
        sizes = {"in_features": 392, **sizes}
    if op != "paged_attention":
        sizes = {**sizes, "num_tokens": num_tokens}
    return op, make(op, dtype, seed=num_tokens, **sizes)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 7, 16, 32])
@pytest.mark.parametrize("name", PROBLEMS)
def test_as_good_as_torch_and_the_same_every_time(name, num_tokens, dtype, where):
    op, inputs = problem(name, dtype, where, num_tokens)
    there = on(where, inputs)
    got = run(op, there, "cuda")
    for plain, mine, right in zip(
        run(op, inputs, "reference"), got, exact(op, inputs), strict=True
    ):
        error = (mine.cpu() - right).abs().max()
        allowed = 2 * (plain - right).abs().max()
        assert error <= allowed + FLOOR[dtype] * right.abs().max().clamp(min=1)
    for _ in range(3):
        assert same_bits(run(op, there, "cuda"), got)
    for counters in workspace.SHARED._counters.values():
        assert not counters.any()


@pytest.mark.parametrize("name", [n for n, p in PROBLEMS.items() if p[0] == "modulated_linear"])
def test_a_row_is_the_same_alone_and_in_any_batch(name, where):
    op, inputs = problem(name, torch.bfloat16, where, 32)
    inputs = on(where, inputs)
    (whole,) = run(op, inputs, "cuda")
    for rows in (slice(0, 1), slice(9, 18), slice(3, 31)):
        part = {**inputs, "x": inputs["x"][rows]}
        if inputs.get("slots") is not None:
            part["slots"] = inputs["slots"][rows]
        assert same_bits(run(op, part, "cuda"), [whole[rows]])


def test_captured_graphs_replay_the_kernels_in_any_order(where):
    if where.type == "cpu":
        pytest.skip("a CUDA graph needs a GPU")
    op, inputs = problem("gated", torch.bfloat16, where, 8)
    inputs = on(where, inputs)
    (expected,) = run(op, inputs, "cuda")
    captured = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.append((graph, *run(op, inputs, "cuda")))
    for graph, recorded in 3 * captured[::-1]:
        recorded.fill_(float("nan"))
        graph.replay()
        assert same_bits([recorded], [expected])
