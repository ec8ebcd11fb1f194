"""Build of the native modules: setuptools and pybind11, no torch.

FSSA_BUILD in the environment says what must be built. Unset: the CPU kernels if a compiler is
found, the CUDA kernels if nvcc is found; what cannot be built is reported, and the package installs
without it and runs on the PyTorch references. "cpu": the CPU kernels alone, and a failure to build
them is an error. "cuda": both, and a failure of either is an error. Whether there is a GPU does not
matter. FSSA_BUILD_JOBS: how many files are compiled at once, all processors' worth if unset.

The CUDA kernels are compiled for the architectures in TORCH_CUDA_ARCH_LIST ("8.0;9.0a"), or for
those of `_ARCHITECTURES` that nvcc knows, by the nvcc of CUDA_HOME, or of the path.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError, ExecError, LinkError, PlatformError, SetupError

FSSA_BUILD = os.environ.get("FSSA_BUILD", "")

_ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
_FAILURES = (CompileError, LinkError, ExecError, PlatformError, SetupError, OSError)
_WITHOUT = {
    "fssa_kernels._native": (
        "the package works without it, on the slower PyTorch references. To have it, install a "
        "C++17 compiler and install again; FSSA_BUILD=cpu makes this an error."
    ),
    "fssa_kernels._cuda": (
        "the package works without it, on Triton's kernels. FSSA_BUILD=cuda makes this an error, "
        "FSSA_BUILD=cpu does not try."
    ),
}


class CudaExtension(Pybind11Extension):
    """An extension some of whose sources nvcc compiles."""

    def __init__(self, name: str, sources: list[str], cuda_sources: list[str], **options) -> None:
        super().__init__(name, sources, cxx_std=17, **options)
        self.cuda_sources = cuda_sources


class BuildNative(build_ext):
    """build_ext that adds OpenMP where the compiler has it, runs nvcc, and words a failure."""

    def build_extensions(self) -> None:
        wanted, built = list(self.extensions), []
        for extension in wanted:
            self.extensions[:] = [extension]
            try:
                self._prepare(extension)
                super().build_extensions()
                built.append(extension)
            except _FAILURES as error:
                if _is_required(extension):
                    raise
                sys.stderr.write(
                    f"fssa: {extension.name} was not built: {error}\n"
                    f"fssa: {_WITHOUT[extension.name]}\n"
                )
        self.extensions[:] = built

    def _prepare(self, extension: Pybind11Extension) -> None:
        msvc = self.compiler.compiler_type == "msvc"
        if isinstance(extension, CudaExtension):
            if msvc:
                raise PlatformError("the CUDA kernels are built on Linux")
            extension.extra_compile_args += ["-O2", "-fvisibility=hidden"]
            self._run_nvcc(extension)
            return
        if msvc:
            flags = ["/O2", "/openmp:experimental"]
        else:
            openmp = "-fopenmp" if self._compiles("-fopenmp") else "-fopenmp-simd"
            if openmp != "-fopenmp":
                self.announce("fssa: this compiler has no OpenMP; the kernels run serially", 3)
            # A row's bits must not depend on how the compiler fuses one loop and not another.
            flags = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", openmp]
        extension.extra_compile_args += flags
        extension.extra_link_args += [flag for flag in flags if flag == "-fopenmp"]

    def _run_nvcc(self, extension: CudaExtension) -> None:
        """Compile the CUDA sources, unless they were compiled so before, and have them linked."""
        nvcc = find_nvcc()
        if nvcc is None:
            raise PlatformError("nvcc was not found, in CUDA_HOME or on the path")
        names = architectures(nvcc)
        extension.define_macros.append(("FSSA_ARCHITECTURES", f'"{",".join(names)}"'))
        flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        for name in names:
            flags += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
        tag = hashlib.sha256(" ".join([nvcc, *flags]).encode()).hexdigest()[:12]
        folder = Path(self.build_temp, f"cuda-{tag}")
        folder.mkdir(parents=True, exist_ok=True)
        newest = max(os.path.getmtime(path) for path in extension.depends)

        def compile_one(source: str) -> str:
            target = folder / (Path(source).stem + ".o")
            if self.force or not target.exists() or target.stat().st_mtime < newest:
                _run([nvcc, *flags, "-c", source, "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            extension.extra_objects += list(pool.map(compile_one, extension.cuda_sources))
        extension.library_dirs += _runtime_folders(nvcc)
        # Linked in: the module loads where CUDA is not installed, and beside any other CUDA.
        extension.libraries += ["cudart_static", "rt", "dl", "pthread"]

    def _compiles(self, flag: str) -> bool:
        """Whether a program using OpenMP compiles and links with this flag."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(
                "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
            )
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_postargs=[flag]
                )
                self.compiler.link_executable(
                    objects, "probe", output_dir=folder, extra_postargs=[flag]
                )
            except _FAILURES:
                return False
        return True


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME or CUDA_PATH, or the path's, or of the folder CUDA installs itself to.

    A script that stands in for nvcc on the path says nothing of where the libraries are, so the
    folder goes first if it is there.
    """
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    for home in [*(home for home in homes if home), "/usr/local/cuda"]:
        nvcc = Path(home, "bin", "nvcc")
        if nvcc.exists():
            return str(nvcc)
    return shutil.which("nvcc")


def architectures(nvcc: str) -> list[str]:
    """What to compile for: what was asked for, or all of ours that this nvcc knows.

    A list made for other packages begins below what these kernels need, or ends in +PTX: that is
    passed over, and only machine code is made.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    known = {name.removeprefix("sm_") for name in _run([nvcc, "--list-gpu-code"]).split()}
    if not asked:
        return [name for name in _ARCHITECTURES if name.rstrip("af") in known]
    names = [name for name in dict.fromkeys(_parse(asked)) if int(name.rstrip("af")) >= 80]
    if not names:
        raise SetupError(f"TORCH_CUDA_ARCH_LIST: expected one from 8.0 on, got {asked!r}")
    unknown = [name for name in names if name.rstrip("af") not in known]  # it lists no "90a"
    if unknown:
        raise SetupError(
            f"TORCH_CUDA_ARCH_LIST: expected some of {', '.join(sorted(known))}, which {nvcc} "
            f"knows, got {', '.join(unknown)}"
        )
    return names


def _parse(asked: str) -> Iterator[str]:
    """ "8.0;9.0a" or "80 90a" -> "80", "90a"."""
    for word in re.split(r"[;,\s]+", asked.strip()):
        found = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", word)
        if found is None:
            raise SetupError(
                f"TORCH_CUDA_ARCH_LIST: expected architectures such as 8.0 or 9.0a, got {word!r}"
            )
        yield found[1] + found[2] + found[3]


def _runtime_folders(nvcc: str) -> list[str]:
    root = Path(nvcc).resolve().parent.parent
    folders = [root / "lib64", root / "lib", *root.glob("targets/*/lib")]
    return [str(folder) for folder in folders if (folder / "libcudart_static.a").exists()]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    sys.stderr.write(done.stderr)
    return done.stdout


def _is_required(extension: Pybind11Extension) -> bool:
    if isinstance(extension, CudaExtension):
        return FSSA_BUILD == "cuda"
    return FSSA_BUILD != ""


def _sources(folder: str, *endings: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).iterdir() if path.suffix in endings)


def _extensions() -> list[Pybind11Extension]:
    headers = [str(p) for p in Path("csrc").rglob("*") if p.suffix in (".h", ".inl")]
    native = Pybind11Extension(
        "fssa_kernels._native",
        # Backwards, so that the instruction sets, which take longest, are among the first.
        [*_sources("csrc/cpu", ".cpp")[::-1], "csrc/bindings.cpp"],
        depends=headers,
        cxx_std=17,
    )
    if FSSA_BUILD == "cpu" or (FSSA_BUILD == "" and find_nvcc() is None):
        return [native]
    cuda = CudaExtension(
        "fssa_kernels._cuda",
        _sources("csrc/cuda", ".cpp"),
        _sources("csrc/cuda", ".cu"),
        depends=_sources("csrc/cuda", ".cu", ".cuh", ".h"),
        define_macros=[("FSSA_MODULE", "_cuda")],
    )
    return [native, cuda]


if FSSA_BUILD not in ("", "cpu", "cuda"):
    raise SetupError(f"FSSA_BUILD: expected cpu, cuda or nothing, got {FSSA_BUILD!r}")

ParallelCompile("FSSA_BUILD_JOBS").install()
setup(ext_modules=_extensions(), cmdclass={"build_ext": BuildNative})
