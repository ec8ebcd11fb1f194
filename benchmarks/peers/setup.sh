#!/usr/bin/env bash
# Make one virtual environment per peer of the CPU benchmark; --help says how.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: benchmarks/peers/setup.sh [--python PYTHON] [FOLDER] [PEER ...]

Makes FOLDER/PEER (default: runs/peers) for each PEER: llama_cpp, peft, vllm, hf (default: these), and
xlogit, which benchmarks/people.py compares with.
An environment that is finished and up to date is left alone. A peer that cannot be installed is
reported, the others are still made, and the exit status is 1.

  --python PYTHON  interpreter of the environments (default: python3); the pins are for 3.11
  --help           this text

Packages come from wherever pip is set up to look. torch must be among them as a CPU build: the
build for CUDA is refused, not downloaded. llama.cpp is compiled for this machine's processor and
needs a C++ compiler and CMake; its build uses CMAKE_BUILD_PARALLEL_LEVEL jobs if that is set, else
all cores.
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$here/../../runs/peers
python=python3
peers=()
positional=0
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --python)
            [ $# -ge 2 ] || { echo "setup.sh: --python needs an interpreter" >&2; exit 2; }
            python=$2
            shift ;;
        -*) echo "setup.sh: unknown option $1 (see --help)" >&2; exit 2 ;;
        *)
            if [ $positional -eq 0 ]; then folder=$1; else peers+=("$1"); fi
            positional=1 ;;
    esac
    shift
done
[ ${#peers[@]} -gt 0 ] || peers=(llama_cpp peft vllm hf)
for peer in "${peers[@]}"; do
    [ -f "$here/requirements-$peer.txt" ] || { echo "setup.sh: no peer is called $peer" >&2; exit 2; }
done
command -v "$python" >/dev/null || { echo "setup.sh: there is no $python" >&2; exit 2; }
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

# The line "torch==..." of a peer's requirements, as its CPU build.
install_torch() {
    local wanted
    wanted=$(sed -n 's/^\(torch==[^ +]*\).*/\1+cpu/p' "$here/requirements-$1.txt")
    "$folder/$1/bin/pip" install --quiet "$wanted" || {
        echo "pip knows no $wanted: show it a source of CPU builds of torch" >&2
        return 1
    }
}

install_llama_cpp() {
    # Everything the processor has, AVX-512 BF16 included, and the matrix products that use it.
    CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DGGML_LLAMAFILE=ON
        -DLLAVA_BUILD=OFF" \
        "$folder/llama_cpp/bin/pip" install --quiet --no-binary llama-cpp-python \
        -r "$here/requirements-llama_cpp.txt"
}

install_hf() { install_torch hf && "$folder/hf/bin/pip" install --quiet -r "$here/requirements-hf.txt"; }

install_peft() {
    install_torch peft && "$folder/peft/bin/pip" install --quiet -r "$here/requirements-peft.txt"
}

install_xlogit() {
    "$folder/xlogit/bin/pip" install --quiet -r "$here/requirements-xlogit.txt"
}

install_vllm() {
    # Its metadata asks for torchvision, torchaudio and torchcodec, which text does not need: the
    # requirements are the whole list, and pip adds nothing to it.
    install_torch vllm &&
        grep -v '^torch==' "$here/requirements-vllm.txt" |
        "$folder/vllm/bin/pip" install --quiet --no-deps -r /dev/stdin
}

check() {
    local program
    case $1 in
        llama_cpp) program='import llama_cpp, gguf, numpy' ;;
        # Which of its modules this processor can run is vLLM's to say.
        vllm) program='import torch; assert torch.version.cuda is None
from vllm.platforms import current_platform; current_platform.import_kernels()' ;;
        hf) program='import torch; assert torch.version.cuda is None; import transformers' ;;
        xlogit) program='import xlogit' ;;
        peft) program='import torch; assert torch.version.cuda is None; import peft' ;;
    esac
    (cd "$folder" && "$folder/$1/bin/python" -c "$program")
}

failed=()
for peer in "${peers[@]}"; do
    environment=$folder/$peer
    # What the environment is made of: it is made again when this text changes.
    recipe=$(declare -f "install_$peer" install_torch; cat "$here/requirements-$peer.txt")
    if [ -f "$environment/installed" ] && [ "$(cat "$environment/installed")" = "$recipe" ]; then
        echo "$peer: already there"
        continue
    fi
    echo "$peer: installing into $environment"
    rm -f "$environment/installed"
    if "$python" -m venv --clear "$environment" && "install_$peer" && check "$peer"; then
        printf '%s\n' "$recipe" >"$environment/installed"
        echo "$peer: done"
    else
        echo "$peer: could not be installed, see above; it is left out" >&2
        failed+=("$peer")
    fi
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "left out: ${failed[*]}" >&2
    exit 1
fi
