"""Memory on huge pages, and where there are none."""

import errno
import mmap

import pytest
import torch

from fssa_kernels import PackArena, pack_matrix, zeros_on_huge_pages
from fssa_kernels.native import NATIVE


class WithoutHugePages(mmap.mmap):
    def madvise(self, *_):
        raise OSError(errno.EINVAL, "Invalid argument")


@pytest.mark.parametrize("num_bytes", [0, 1, 100, (1 << 21) + 3])
@pytest.mark.parametrize("there_are_some", [True, False])
def test_memory_is_zero_aligned_and_writable(monkeypatch, num_bytes, there_are_some):
    if not there_are_some:
        monkeypatch.setattr(mmap, "mmap", WithoutHugePages)
    memory = zeros_on_huge_pages(num_bytes)
    assert memory.shape == (num_bytes,)
    assert memory.dtype == torch.uint8
    assert not memory.any()
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert memory.data_ptr() % (1 << 21) == 0 or num_bytes == 0
    assert memory.fill_(7).eq(7).all()


def test_a_system_without_them_has_memory_too(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert torch.equal(zeros_on_huge_pages(5), torch.zeros(5, dtype=torch.uint8))


def test_memory_lives_as_long_as_what_views_it():
    view = zeros_on_huge_pages(4096).view(torch.int32).view(2, 512)[1]
    others = [zeros_on_huge_pages(4096).fill_(1) for _ in range(50)]
    assert not view.any()
    assert all(other.eq(1).all() for other in others)


@pytest.mark.skipif(NATIVE is None, reason="needs the native module")
def test_packing_needs_no_huge_pages(monkeypatch):
    monkeypatch.setattr(mmap, "mmap", WithoutHugePages)
    matrix = torch.randn(20, 7)
    assert torch.equal(pack_matrix(matrix, arena=PackArena()).unpack(), matrix)
