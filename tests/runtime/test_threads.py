"""How many threads compute, on made-up machines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fssa_runtime import LLM, threads
from fssa_runtime.errors import InputError
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.threads import available_cores, set_or_limit_threads, set_threads

from .conditioned import small_model


def machine(root: Path, cores: list[int]) -> Path:
    """Processor i is a thread of core ``cores[i]``."""
    for processor, core in enumerate(cores):
        topology = root / f"sys/devices/system/cpu/cpu{processor}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text("0\n")
        (topology / "core_id").write_text(f"{core}\n")
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    allowed = {0, 1, 2, 3}
    monkeypatch.setattr(threads, "_processors", lambda: allowed)
    return allowed


def test_hyperthreads_count_once(tmp_path: Path, processors: set[int]) -> None:
    assert available_cores(machine(tmp_path, [0, 1, 0, 1])) == 2


def test_only_processors_of_the_affinity_count(tmp_path: Path, processors: set[int]) -> None:
    processors -= {1, 2, 3}
    assert available_cores(machine(tmp_path, [0, 1, 2, 3])) == 1


def test_without_sys_every_processor_counts(tmp_path: Path, processors: set[int]) -> None:
    assert available_cores(tmp_path) == 4


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("", 4)],
)
def test_a_quota_of_a_group_or_one_around_it(
    tmp_path: Path, processors: set[int], quota: str, expected: int
) -> None:
    root = machine(tmp_path, [0, 1, 2, 3])
    write(root / "proc/self/cgroup", "0::/pod/box\n")
    write(root / "sys/fs/cgroup/pod/box/cpu.max", "max 100000\n")
    write(root / "sys/fs/cgroup/pod/cpu.max", quota)
    assert available_cores(root) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 4), ("300000", 3)])
def test_a_quota_of_version_one(
    tmp_path: Path, processors: set[int], quota: str, expected: int
) -> None:
    root = machine(tmp_path, [0, 1, 2, 3])
    write(root / "proc/self/cgroup", "4:memory:/\n3:cpu,cpuacct:/box\n")
    write(root / "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", quota)
    write(root / "sys/fs/cgroup/cpu/box/cpu.cfs_period_us", "100000")
    assert available_cores(root) == expected


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody has chosen a number of threads yet; afterwards it is as before."""
    monkeypatch.setattr(threads, "_chosen", None)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small_model(tmp_path_factory.mktemp("threads") / "model")


def test_setting_them(restored: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set_threads(3) == torch.get_num_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")
    assert set_threads(None) == torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "nonsense")
    assert set_threads(None) == available_cores()
    with pytest.raises(InputError, match="at least 1, got 0"):
        set_threads(0)


def test_a_library_takes_no_more_than_there_are(
    restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer stay as whoever set them wanted; more than the container grants would wait."""
    monkeypatch.setattr(threads, "available_cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for already, wanted, expected in ((1, None, 1), (4, None, 2), (4, 3, 3), (1, 2, 2)):
        torch.set_num_threads(already)
        assert set_or_limit_threads(wanted) == torch.get_num_threads() == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    for already, expected in ((5, 5), (8, 6)):
        torch.set_num_threads(already)
        assert set_or_limit_threads(None) == torch.get_num_threads() == expected


def test_more_stay_where_set_threads_chose_them(
    restored: None, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fssa --threads 4 demo` makes an LLM on a machine of two cores."""
    monkeypatch.setattr(threads, "available_cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    set_threads(4)
    LLM(model)
    assert torch.get_num_threads() == 4
    torch.set_num_threads(5)
    LLM(model)
    assert torch.get_num_threads() == 2
