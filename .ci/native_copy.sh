# For scripts that test the native kernels in another build: `native_copy WORK FLAGS` builds
# fssa_kernels._native with setup.py's own flags and FLAGS after them, in WORK, beside a copy of the
# package and its kernel tests, so that neither the checkout nor an installed module is touched. It
# leaves the shell in that copy. PYTHON (default python3) must have what the tests need; CXX (default
# g++) is the compiler.

# What tests the native kernels and StepGraph, in either build.
# shellcheck disable=SC2034  # used by the scripts that read this
native_tests=(
    tests/kernels/test_native.py tests/kernels/test_native_bad_input.py
    tests/kernels/test_native_sample.py tests/kernels/test_modulated_linear_native.py
    tests/kernels/test_graph.py tests/kernels/test_graph_recording.py
    tests/kernels/test_graph_interrupted.py tests/kernels/test_graph_repeat.py
    tests/kernels/test_advance_step.py tests/kernels/test_compressed.py
)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
compiler=${CXX:-g++}

native_copy() {
    local work=$1 flags=$2 folder
    # A compiler that adds the flags after setup.py's, of which the last -O wins.
    printf '#!/bin/sh\nexec %s "$@" %s\n' "$compiler" "$flags" > "$work/compiler"
    chmod +x "$work/compiler"
    (cd "$root" && CC="$work/compiler" CXX="$work/compiler" FSSA_BUILD=cpu \
        "$python" setup.py --quiet build_ext --force \
        --build-lib "$work/lib" --build-temp "$work/objects")
    for folder in fssa_kernels tests/kernels; do
        mkdir -p "$work/lib/$folder"
        (cd "$root/$folder" && find . -name '*.py' -print0 | tar -c --null -T - -f -) |
            tar -x -C "$work/lib/$folder" -f -
    done
    cp "$root/tests/__init__.py" "$work/lib/tests/"
    cd "$work/lib"
    export PYTHONPATH="$work/lib" PYTHONDONTWRITEBYTECODE=1
    unset CC CXX FSSA_BUILD
}

# Fails unless the module that Python finds is the one just built.
check_native_copy() {
    "$python" - "$PWD" <<'END'
import sys
from fssa_kernels.native import MISSING, NATIVE
assert NATIVE is not None, MISSING
assert NATIVE.__file__.startswith(sys.argv[1]), f"not the module just built: {NATIVE.__file__}"
END
}

# The text at the top of the script, without its marks.
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }
