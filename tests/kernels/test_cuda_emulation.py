"""The emulation of a GPU that the CUDA kernels are tested on: what it computes, what it notices."""

import math

import pytest
import torch

from tests.kernels.cuda_emulation import FLAGS, SOURCES, compiler, emulated, run  # noqa: F401

PROBES = {
    "matrix product": "right",
    "matrix load": "right",
    "barrier": "right",
    "no barrier": "wrong",
    "copy": "right",
    "copy not waited for": "wrong",
    "tiles": "right",
    "tiles not waited for": "wrong",
    "tiles of fewer bytes than expected": "every thread waits for another",
    "barrier not initialised": "waits at a barrier that nobody has initialised",
    "past the end": "wrote past the end of shared memory",
    "diverged": "the lanes of a warp are at different instructions",
    "left early": "a thread ended while others wait at the block's barrier",
    "half a warp": "every thread waits for another",
    "misaligned": "an access of 16 bytes is misaligned",
}


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    if compiler() is None:
        pytest.skip("no g++ or clang++ to compile the probes with")
    program = str(tmp_path_factory.mktemp("probes") / "probes")
    source = str(SOURCES.parents[1] / "tests" / "kernels" / "cuda_probes.cpp")
    run([compiler(), *FLAGS, f"-I{SOURCES}", "-o", program, source])
    return dict(line.split(": ", 1) for line in run([program]).splitlines())


@pytest.mark.parametrize("name", PROBES)
def test_probe(name, probes):
    assert probes[name] == PROBES[name]


def test_every_half_precision_number_is_read_as_torch_reads_it(emulated):  # noqa: F811
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for code, dtype in ((1, torch.bfloat16), (2, torch.float16)):
        numbers = bits.view(dtype).float()
        for number in numbers[torch.randperm(65536, generator=torch.Generator().manual_seed(0))][
            :4000
        ].tolist():
            rounded, value = emulated.round_to(number, code)
            if math.isnan(number):
                assert math.isnan(value)
                continue
            assert value == number
            assert rounded == int(torch.tensor(number).to(dtype).view(torch.int16)) & 0xFFFF


@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-7, 3e4])
def test_numbers_are_rounded_as_torch_rounds_them(scale, emulated):  # noqa: F811
    numbers = scale * torch.randn(2000, generator=torch.Generator().manual_seed(1))
    # Halfway between two numbers, too.
    numbers[:500] = (numbers[:500].half().double() * (1 + 2**-11)).float()
    for code, dtype in ((1, torch.bfloat16), (2, torch.float16)):
        expected = (numbers.to(dtype).view(torch.int16).int() & 0xFFFF).tolist()
        assert [emulated.round_to(x, code)[0] for x in numbers.tolist()] == expected
