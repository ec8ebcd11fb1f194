"""Build of the native module: setuptools and pybind11, no torch.

FSSA_BUILD in the environment says what must be built. Unset: the CPU kernels if a compiler is
found, otherwise the package installs without them and runs on the PyTorch references. "cpu": the
CPU kernels, and a failure to build them is an error. "cuda" is refused: there are no CUDA sources.
"""

import os
import sys
import tempfile
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError, ExecError, LinkError, PlatformError, SetupError

FSSA_BUILD = os.environ.get("FSSA_BUILD", "")


class BuildNative(build_ext):
    """build_ext that adds OpenMP where the compiler has it, and words a failure."""

    def build_extensions(self) -> None:
        if self.compiler.compiler_type == "msvc":
            flags = ["/O2", "/openmp:experimental"]
        else:
            openmp = "-fopenmp" if self._compiles("-fopenmp") else "-fopenmp-simd"
            if openmp != "-fopenmp":
                self.announce("fssa: this compiler has no OpenMP; the kernels run serially", 3)
            # A row's bits must not depend on how the compiler fuses one loop and not another.
            flags = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", openmp]
        for extension in self.extensions:
            extension.extra_compile_args += flags
            extension.extra_link_args += [flag for flag in flags if flag == "-fopenmp"]
        try:
            super().build_extensions()
        except (CompileError, LinkError, ExecError, PlatformError, OSError) as error:
            if FSSA_BUILD == "cpu":
                raise
            sys.stderr.write(
                f"fssa: fssa_kernels._native was not built: {error}\n"
                "fssa: the package works without it, on the slower PyTorch references. To have it, "
                "install a C++17 compiler and install again; FSSA_BUILD=cpu makes this an error.\n"
            )
            self.extensions[:] = []

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
            except (CompileError, LinkError, ExecError, PlatformError, OSError):
                return False
        return True


if FSSA_BUILD == "cuda":
    raise SetupError(
        "FSSA_BUILD=cuda: there are no CUDA sources yet; unset it or use FSSA_BUILD=cpu"
    )
if FSSA_BUILD not in ("", "cpu"):
    raise SetupError(f"FSSA_BUILD: expected cpu, cuda or nothing, got {FSSA_BUILD!r}")

setup(
    ext_modules=[
        Pybind11Extension(
            "fssa_kernels._native",
            sorted(["csrc/bindings.cpp", *(str(p) for p in Path("csrc/cpu").glob("*.cpp"))]),
            depends=[str(p) for p in Path("csrc").rglob("*") if p.suffix in (".h", ".inl")],
            cxx_std=17,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
