"""Which calls the CUDA kernels are offered: the module, architectures, and what dispatch says."""

import pytest
import torch

from fssa_kernels import explain, modulated_linear
from fssa_kernels.cuda import backend, module
from fssa_kernels.cuda.backend import is_aligned
from fssa_kernels.cuda.module import is_compiled_for
from fssa_kernels.gpu.device import Device
from tests.kernels.accuracy import make


@pytest.mark.parametrize(
    ("capability", "compiled", "runs"),
    [
        (80, ["80"], True),
        (86, ["80"], True),  # a later step of the same generation
        (86, ["80", "86"], True),
        (80, ["86"], False),
        (90, ["80", "89"], False),
        (90, ["90a"], True),
        (90, ["90"], True),
        (100, ["90a"], False),
        (103, ["100"], True),
        (103, ["100a"], False),
        (120, ["100"], False),
        (121, ["120"], True),
        (90, [], False),
    ],
)
def test_machine_code_runs_on_its_generation(capability, compiled, runs):
    assert is_compiled_for(capability, compiled) is runs


def verdict(inputs):
    return next(v for v in explain(modulated_linear, **inputs) if v.backend == "cuda")


def inputs_of(dtype=torch.bfloat16):
    return make("modulated_linear", dtype, family="gated", in_features=64)


def test_tensors_on_a_cpu_are_not_for_it():
    told = verdict(inputs_of())
    assert not told.can
    assert told.reason == "cannot: the kernels run on NVIDIA GPUs, not on cpu"
    with pytest.raises(ValueError, match="backend 'cuda' cannot serve this call"):
        modulated_linear(**inputs_of(), backend="cuda")


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU, of which nothing but that is asked."""

    device = torch.device("cuda:0")


@pytest.fixture
def unavailable(monkeypatch):
    """Why there is no kernel for a tensor on a GPU of some capability, given some module."""

    def ask(capability, compiled, error=None):
        loaded = None if compiled is None else type("Module", (), {"architectures": compiled})
        monkeypatch.setattr(module, "_load", lambda: (loaded, error or ""))
        facts = Device("x", capability, 100, 99 << 10)
        monkeypatch.setattr(backend, "device_of", lambda tensor: facts)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        return backend._unavailable(torch.zeros(1).as_subclass(OnGpu))

    return ask


def test_a_missing_module_and_another_generation_are_told(unavailable):
    assert unavailable(90, None, "it was not built") == "it was not built"
    assert unavailable(90, ["80", "90a"]) is None
    told = unavailable(100, ["80", "90a"])
    assert told == "cuda:0 is sm_100, the kernels were compiled for sm_80, sm_90a"


def test_loading_says_what_is_wrong(monkeypatch):
    def load(error):
        def refuse(name):
            raise error

        monkeypatch.setattr(module.importlib, "import_module", refuse)
        module._load.cache_clear()
        try:
            return module.missing()
        finally:
            module._load.cache_clear()

    assert "was not built (no nvcc at installation)" in load(ModuleNotFoundError("none"))
    assert "does not load: no libfoo" in load(ImportError("no libfoo"))


def test_alignment_looks_at_the_strides_that_are_used():
    memory = torch.zeros(4, 24, dtype=torch.bfloat16)
    assert is_aligned(memory)
    assert is_aligned(memory[:, 8:16])
    assert not is_aligned(memory[:, 4:16])
    assert not is_aligned(torch.zeros(4, 20, dtype=torch.bfloat16))
    assert is_aligned(torch.zeros(4, 20, dtype=torch.bfloat16)[:1])  # one row: no stride
    assert is_aligned(torch.zeros(4, 20, dtype=torch.float32))
    assert is_aligned(torch.zeros(0, 20, dtype=torch.bfloat16))


def test_the_built_module_loads_without_a_gpu_and_names_its_architectures():
    loaded = module.cuda_module()
    if loaded is None:
        pytest.skip(module.missing())
    assert module.architectures()
    assert all(name.rstrip("af").isdigit() for name in module.architectures())
    assert loaded.emulated is False
    plan = loaded.modulated_linear_plan(
        device=loaded.DeviceLimits(90, 132, 227 << 10),
        num_tokens=1,
        in_features=4096,
        splits=[4096],
        paired=False,
        family=2,
        rank=16,
    )
    assert plan.grid == 132
