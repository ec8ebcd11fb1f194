"""How many threads compute: by default one for each physical core this process may use.

Two hyperthreads of a core share its multipliers, and threads past a container's quota are put to
sleep in the middle of a step with the others waiting for them; so neither is counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .env import omp_num_threads
from .errors import InputError

_chosen: int | None = None  # by the last `set_threads`


def set_threads(wanted: int | None) -> int:
    """Let torch and the native kernels use ``wanted`` threads; returns the number.

    None: `default_threads`. The number is torch's, of the whole process.

    Raises:
        InputError: fewer than one.
    """
    import torch

    global _chosen
    if wanted is None:
        wanted = default_threads()
    if wanted < 1:
        raise InputError(f"threads: expected at least 1, got {wanted}")
    torch.set_num_threads(wanted)
    _chosen = wanted
    return wanted


def set_or_limit_threads(wanted: int | None) -> int:
    """As `set_threads` for a library in somebody's process: None leaves torch's number as it is,
    unless that is more than `default_threads` and not what `set_threads` chose.

    More that ``torch.set_num_threads`` chose cannot be told from torch's own number, which knows
    nothing of quotas, and is lowered too.
    """
    import torch

    if wanted is not None:
        return set_threads(wanted)
    current = torch.get_num_threads()
    if current != _chosen and current > default_threads():
        torch.set_num_threads(default_threads())
    return torch.get_num_threads()


def default_threads() -> int:
    """``OMP_NUM_THREADS`` if that is set, otherwise `available_cores`."""
    return omp_num_threads() or available_cores()


def available_cores(root: Path = Path("/")) -> int:
    """Physical cores among the processors this process may run on, within its cgroup's quota.

    ``root`` is where ``sys`` and ``proc`` lie. On systems without them: the processors.
    """
    cores = len({_core(root, processor) for processor in _processors()})
    quotas = [quota for quota in _quotas(root) if quota is not None]
    return max(1, min([cores, *(int(quota) for quota in quotas)]))


def _processors() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _core(root: Path, processor: int) -> tuple[str, str]:
    """What two processors have in common exactly if they are threads of one core."""
    topology = root / f"sys/devices/system/cpu/cpu{processor}/topology"
    package, core = _text(topology / "physical_package_id"), _text(topology / "core_id")
    return (package, core) if package and core else ("", str(processor))


def _quotas(root: Path) -> Iterator[float | None]:
    """Processors that each cgroup around this process is granted; None where there is no limit."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        folder = Path(path.lstrip("/"))
        for group in (folder, *folder.parents):
            if not controllers:  # version 2
                limit = _text(root / "sys/fs/cgroup" / group / "cpu.max").split()
                yield _quota(limit)
            elif "cpu" in controllers.split(","):
                base = root / "sys/fs/cgroup/cpu" / group
                yield _quota([_text(base / "cpu.cfs_quota_us"), _text(base / "cpu.cfs_period_us")])


def _quota(limit: list[str]) -> float | None:
    if len(limit) != 2 or not all(part.isdigit() for part in limit) or limit[1] == "0":
        return None  # "max", -1 or nothing there
    return int(limit[0]) / int(limit[1])


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
