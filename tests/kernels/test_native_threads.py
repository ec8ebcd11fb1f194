"""How a team of threads shares its work out: csrc/cpu/threads.h, compiled into a program."""

import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="no g++ or clang++")
def test_who_has_no_work_left_takes_what_another_has_not_begun(tmp_path):
    program = tmp_path / "threads_probe"
    sources = f"-I{FOLDER.parents[1] / 'csrc' / 'cpu'}", str(FOLDER / "threads_probe.cpp")
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-fopenmp", *sources, "-o", str(program)], check=True
    )
    result = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, "nobody helped"
    assert result.stdout.split() == ["1"] * 16
