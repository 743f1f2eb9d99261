#!/usr/bin/env bash
# get-toolkit.sh [FOLDER]: fetches CUDA 13.0's compiler and headers from PyPI into FOLDER (default: ~/.cache/wavegen/toolkit),
# builds stand-ins for the CUDA libraries to link against (stand_ins.py), and prints the settings to build with:
#
#     eval "$(scripts/cuda/get-toolkit.sh)"
#     cargo build --release --features cuda
#
# Needs x86-64 Linux, gcc, python3 with pip, cargo; neither a GPU nor a driver. A second run only prints.
# 13.0 on purpose: a driver of the 580 series refuses PTX from a later compiler.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:-$HOME/.cache/wavegen/toolkit}
packages=(
    nvidia-cuda-nvcc==13.0.88    # nvcc, ptxas, fatbinary
    nvidia-cuda-crt==13.0.88     # headers of the compiler
    nvidia-nvvm==13.0.88         # cicc, libdevice
    nvidia-cuda-runtime==13.0.96 # cuda.h, cuda_bf16.h
    nvidia-cuda-cccl==13.0.85    # cub, thrust, libcu++: candle's kernels want them
)

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
home=$folder/nvidia/cu13
# cudarc's bindings say which functions the stand-ins must have.
cudarc=$(sed -n '/^name = "cudarc"$/{n;s/^version = "\(.*\)"$/\1/p}' "$here/../../Cargo.lock")
recipe="${packages[*]} cudarc $cudarc $(cat "$here"/* | sha256sum)"

fetch_and_build() {
    rm -rf "${folder:?}/nvidia" "$folder"/*.dist-info
    # In one call: a second one with --target skips the folder that the first one made.
    python3 -m pip install --quiet --no-deps --no-compile --only-binary :all: --root-user-action ignore \
        --target "$folder" "${packages[@]}"
    ln -s lib "$home/lib64"
    ln -s libcudart_static.a "$home/lib/libcudart.a"
    install -m 755 "$here/nvcc-lean" "$home/bin/nvcc-lean"

    cargo fetch --quiet --manifest-path "$here/../../Cargo.toml"
    local bindings build source library
    bindings=$(cargo metadata --quiet --format-version 1 --features cuda --manifest-path "$here/../../Cargo.toml" |
        python3 -c 'import json, os, sys
print(next(os.path.dirname(p["manifest_path"]) for p in json.load(sys.stdin)["packages"] if p["name"] == "cudarc"))')
    build=$(mktemp -d)
    trap 'rm -rf "$build"' RETURN
    python3 "$here/stand_ins.py" "$bindings" "$build"
    gcc -O2 -fPIC -Wall -c "$here/stand_ins.c" -o "$build/loader.o"
    for source in "$build"/*.S; do
        library=$(basename "$source" .S)
        gcc -fPIC -c "$source" -o "$build/$library.o"
        ar rcs "$home/lib/lib$library.a" "$build/$library.o" "$build/loader.o"
    done
    "$home/bin/nvcc" --version | grep -q 'release 13.0' || { echo "error: nvcc does not run" >&2; return 1; }
    printf '%s\n' "$recipe" >"$folder/recipe"
}

[[ -f $folder/recipe && $(<"$folder/recipe") == "$recipe" ]] || fetch_and_build >&2

cat <<SETTINGS
export CUDA_HOME='$home'
export PATH='$home/bin':"\$PATH"
export NVCC='$home/bin/nvcc-lean'
export CUDA_COMPUTE_CAP=90
export CUDAFORGE_THREADS=$(nproc)
SETTINGS
