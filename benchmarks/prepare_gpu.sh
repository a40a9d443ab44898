#!/usr/bin/env bash
# Makes, without a GPU, what benchmarks/gpu_check.sh --bring DIR takes along to a bare machine that has one: the
# package's libraries, and wheels that are pure Python: rivals, and what the benchmarks need beside torch.
#
#   benchmarks/prepare_gpu.sh DIR [--python PYTHON]
#
#   --python PYTHON   an interpreter with the other machine's torch, of a build with CUDA (default python3); nvcc is
#                     found as the package finds it, in $CUDA_HOME/bin or on the PATH
set -eu

[ $# -eq 1 ] || { [ $# -eq 3 ] && [ "$2" = --python ]; } || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
dir=$(cd "$1" && pwd)
python=${3:-python3}
cd "$(dirname "$0")/.."

PYTHONPATH=$PWD TORCH_EXTENSIONS_DIR=$dir/extensions "$python" -c '
from nckernels.backends import build
for library in (build.CUDA, *build.cpu_libraries()):
    print(build.find_or_build(library))'
rm -rf "$dir/wheels"
"$python" -m pip download -q --no-deps --only-binary=:all: -d "$dir/wheels" tqdm "liger-kernel>=0.8.2" cut-cross-entropy
du -sh "$dir" "$dir"/*/*
