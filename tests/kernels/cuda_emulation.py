"""The CUDA kernels on a CPU: csrc/cuda compiled with an ordinary compiler, see emulation.h.

Test files import the fixture `emulated`; the module is compiled once and kept in pytest's cache.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from fssa_kernels.cuda.module import emulating
from fssa_kernels.gpu import workspace
from fssa_kernels.gpu.device import Device

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-DFSSA_EMULATION"]
# One with cp.async, one with bulk copies, and one of each that has little shared memory. They have
# few multiprocessors, so that small problems have blocks with several units and shared tiles.
DEVICES = {
    "sm_80": Device("a100", 80, 5, 163 << 10),
    "sm_86": Device("a10", 86, 3, 99 << 10),
    "sm_90": Device("h100", 90, 7, 227 << 10),
    "sm_120": Device("rtx", 120, 4, 99 << 10),
}

# By digest. pytest makes a session's fixture anew for every file that imports it.
_LOADED = {}


def compiler():
    return shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="session")
def emulated(request):
    """The module; skipped without a compiler."""
    if compiler() is None:
        pytest.skip("no g++ or clang++ to compile the emulated kernels with")
    files = sorted(p for p in SOURCES.iterdir() if p.suffix in (".cu", ".cpp", ".cuh", ".h"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files))
    digest.update(repr((FLAGS, compiler(), sys.version, torch.__version__)).encode())
    name = digest.hexdigest()[:16]
    if name not in _LOADED:
        target = _cache(request) / f"{name}.so"
        # Several processes may share out the tests: one compiles, the others wait.
        with FileLock(target.with_suffix(".lock")):
            if not target.exists():
                with tempfile.TemporaryDirectory() as folder:
                    sources = [path for path in files if path.suffix in (".cu", ".cpp")]
                    _compile(sources, Path(folder), target)
        spec = importlib.util.spec_from_file_location("_cuda_emulated", target)
        _LOADED[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_LOADED[name])
    return _LOADED[name]


def _cache(request):
    cache = getattr(request.config, "cache", None)
    if cache is None:  # pytest -p no:cacheprovider
        return request.getfixturevalue("tmp_path_factory").mktemp("cuda_emulation")
    return cache.mkdir("fssa_cuda_emulation")


def _compile(sources, folder, target):
    # pybind11's headers come with torch; nothing else of torch is used.
    includes = [sysconfig.get_paths()["include"], Path(torch.__file__).parent / "include"]
    flags = [*FLAGS, "-fvisibility=hidden", "-DFSSA_MODULE=_cuda_emulated"]
    flags += ['-DFSSA_ARCHITECTURES="emulated"', *(f"-I{path}" for path in includes)]

    def compile_one(source):
        compiled = folder / (source.name + ".o")
        run([compiler(), *flags, "-x", "c++", "-c", str(source), "-o", str(compiled)])
        return str(compiled)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    linked = folder / "module.so"
    run([compiler(), *FLAGS, "-shared", "-o", str(linked), *objects])
    shutil.move(linked, target)


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(params=["sm_80", "sm_90"])
def device(request, emulated):
    """Inside the test, tensors on the CPU are on such a device; counters are zero after it."""
    with emulating(emulated, DEVICES[request.param]):
        emulated.seed(0)
        yield DEVICES[request.param]
    for counters in workspace.SHARED._counters.values():
        assert not counters.any()
