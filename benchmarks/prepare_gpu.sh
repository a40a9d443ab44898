#!/usr/bin/env bash
# Prepares, without a GPU, the files that benchmarks/gpu_check.sh --bring DIR uses on a bare machine with a GPU: the
# package's libraries, and wheels of pure Python: rivals, and the benchmarks' requirements besides torch.
#
#   benchmarks/prepare_gpu.sh DIR [--python PYTHON] [--quack QUACK]
#
#   --python PYTHON   an interpreter with the GPU machine's torch, a build with CUDA (default python3); nvcc is
#                     searched for in $CUDA_HOME/bin and on the PATH
#   --quack QUACK     also packs quack-kernels for Linux on x86-64, as two archives below 64 MiB in that folder, its
#                     compiler and the rest, to be unpacked into one folder; compression takes minutes
set -eu

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
[ $# -ge 1 ] && [ $(($# % 2)) -eq 1 ] || usage
mkdir -p "$1"
dir=$(cd "$1" && pwd) python=python3 quack=""
shift
while [ $# -gt 0 ]; do
  case $1 in
    --python) python=$2 ;;
    --quack) mkdir -p "$2"; quack=$(cd "$2" && pwd) ;;
    *) usage ;;
  esac
  shift 2
done
cd "$(dirname "$0")/.."

PYTHONPATH=$PWD TORCH_EXTENSIONS_DIR=$dir/extensions "$python" -c '
from nckernels.backends import build
for library in (build.CUDA, *build.cpu_libraries()):
    print(build.find_or_build(library))'
rm -rf "$dir/wheels"
"$python" -m pip download -q --no-deps --only-binary=:all: -d "$dir/wheels" tqdm "liger-kernel>=0.8.2" cut-cross-entropy
du -hd 2 "$dir"

[ -n "$quack" ] || exit 0
# Bindings of CUDA, NumPy, protobuf and einops are left out: the GPU machine has them with its torch.
rm -rf "$quack/packages"
"$python" -m pip install -q --no-deps --no-compile --only-binary=:all: --target "$quack/packages" quack-kernels==0.6.5 \
  nvidia-cutlass-dsl{,-libs-base,-libs-core,-libs-cu13}==4.7.1 apache-tvm-ffi torch-c-dlpack-ext
rm -rf "$quack/packages/bin"
compiler=$(cd "$quack/packages" && find . -name '_cutlass_ir.cu13.*.so')
tar -C "$quack/packages" -cf - "$compiler" | xz -9e >"$quack/compiler.tar.xz"
tar -C "$quack/packages" --exclude="$compiler" -cf - . | xz -6 >"$quack/rest.tar.xz"
rm -rf "$quack/packages"
du -sh "$quack"/*
