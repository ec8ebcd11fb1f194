"""Shared by the kernel tests: fresh outputs hold NaN, so that an element left unwritten shows."""

import pytest
import torch

from fssa_kernels.native import NATIVE


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    before = torch.utils.deterministic.fill_uninitialized_memory
    strict = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(strict)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=NATIVE.instruction_sets() if NATIVE else [])
def each_instruction_set(request):
    before = NATIVE.instruction_set()
    NATIVE.set_instruction_set(request.param)
    yield
    NATIVE.set_instruction_set(before)
