#!/usr/bin/env bash
# The campaign on a GPU: two runs of at most 300 seconds on a bare machine with a GPU. Each run writes a record.
#
#   benchmarks/gpu_check.sh first|second [--python PYTHON] [--bring DIR] [--quack DIR] [--out DIR] [--again FILE]
#                           [--rehearse]
#
#   first             information on the machine, the library, every kernel against float64 (which compiles Triton's
#                     kernels on all cores), times of the suites `campaign` and `launch`, memcheck
#   second            the cases that failed in the first run, tiles, torch.compile's times, ResNet-50 end to end,
#                     memory, racecheck, and as many of the tests as time allows
#   --python PYTHON   an interpreter with torch and CUDA (default python3); the tests need pytest
#   --bring DIR       the output of benchmarks/prepare_gpu.sh (default: compile on this machine, no rivals)
#   --quack DIR       the folder with both of its archives unpacked: also tests quack's product against its contract,
#                     and times the suite `campaign` with it
#   --out DIR         the record (default out/gpu/first or second): summary.txt, reports as JSON, and record.tar.gz
#                     with logs and tile tables, all rewritten after every stage
#   --again FILE      `second`: the first run's correctness.json (default out/gpu/first/correctness.json)
#   --rehearse        tests the script on the CPU, with small problems, five seconds for each, and shorter limits
#
# A stage has its own time limit and log; a failing or hanging stage does not affect the others. Exits with 1 if a
# stage failed. The GPU's settings are not changed. NCKERNELS_* variables are passed on, except NCKERNELS_QUACK.
set -u

usage() { sed -n '2,23s/^# \{0,1\}//p' "$0"; exit 2; }
run=${1:-}
case $run in first | second) shift ;; *) usage ;; esac
python=python3 bring="" quack="" out="" again="" rehearse=""
while [ $# -gt 0 ]; do
  case $1 in
    --rehearse) rehearse=1; shift; continue ;;
    --python | --bring | --quack | --out | --again) [ $# -ge 2 ] || usage ;;
    *) usage ;;
  esac
  declare "${1#--}=$(case $1 in --python) echo "$2" ;; *) realpath -m "$2" ;; esac)"
  shift 2
done

cd "$(dirname "$0")/.." || exit 2
begin=$(date +%s) budget=290 failed=0
mkdir -p "${out:=$PWD/out/gpu/$run}" || exit 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "${again:=$PWD/out/gpu/first/correctness.json}" "$work/before" 2>/dev/null
rm -f "$out"/*.json "$out/record.tar.gz" "$out/summary.txt"
device=cuda dtype=bfloat16 processes=$(nproc)
[ -z "$rehearse" ] || { device=cpu dtype=float32 processes=2; }
export python work bring again rehearse device dtype processes
export TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PATH=$PATH:/usr/local/cuda/bin

say() { echo "$*" | tee -a "$out/summary.txt"; }

# stage NAME LIMIT COMMAND: at most LIMIT seconds, or the rest of the budget; $TIME is the command's own budget.
stage() {
  local name=$1 limit=$2 command=$3 start rc left
  [ -z "$rehearse" ] || limit=$((limit / 4 + 15))
  left=$((budget - $(date +%s) + begin))
  [ "$limit" -lt "$left" ] || limit=$left
  if [ "$limit" -lt 10 ]; then
    say "skipped  $name: the $budget s are over"
    return
  fi
  start=$(date +%s)
  # On an interrupt Python writes its results so far.
  TIME=$([ -n "$rehearse" ] && echo 5 || echo $((limit * 8 / 10))) \
    timeout --signal=INT --kill-after=5 "$limit" bash -c "$command" >"$work/$name.log" 2>&1
  rc=$?
  case $rc in
    0) say "ok       $name ($(($(date +%s) - start)) s)" ;;
    77) say "skipped  $name: $(tail -n 1 "$work/$name.log")" ;;
    124 | 137) failed=1; say "TIMEOUT  $name after $limit s: $name.log" ;;
    *) failed=1; say "FAILED   $name (exit $rc): $(grep -v '^ *$' "$work/$name.log" | tail -n 1 | cut -c1-160)" ;;
  esac
  cp "$work"/*.json "$out" 2>/dev/null
  tar -C "$work" --exclude=./extensions --exclude=./triton --exclude=./inductor --exclude=./rivals \
    -czf "$out/record.tar.gz" .
}

info() {
  nvidia-smi || true
  nvcc --version || true
  "$python" -m nckernels info
}

# Uses the libraries of --bring; compiles if they are stale or do not load.
build() {
  local choose='import nckernels; nckernels.set_backend("cuda"); print("the CUDA library loads")'
  "$python" -c "$choose" || { [ -n "$bring" ] && rm -rf "$work/extensions" && "$python" -c "$choose"; } ||
    [ -n "$rehearse" ]
}

# correctness NAME ARGUMENTS...
correctness() {
  "$python" -m benchmarks correctness --device "$device" --budget "$TIME" --json "$work/$1.json" "${@:2}"
}

again() {
  [ -f "$work/before" ] || { echo "there is no $again"; return 77; }
  correctness correctness --again "$work/before" --processes "$processes"
}

# suite NAME ARGUMENTS...
suite() {
  "$python" -m benchmarks --suite "$1" --device "$device" --dtype "$dtype" --budget "$TIME" --out "$work" --brief \
    "${@:2}"
}

# sanitize TOOL: without torch's caching allocator, so that the tool sees each allocation.
sanitize() {
  local under=(compute-sanitizer --tool "$1" --target-processes all --error-exitcode 9)
  [ -z "$rehearse" ] || under=()
  [ -n "$rehearse" ] || command -v compute-sanitizer || { echo "no compute-sanitizer on the PATH"; return 77; }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${under[@]}" "$python" -m benchmarks correctness --device "$device" \
    --backends "$([ -n "$rehearse" ] && echo chunked || echo cuda)" --budget "$TIME" --json "$work/$1.json"
}

tune() {
  "$python" -m benchmarks tune --budget "$TIME" --out "$work/tuned" ${rehearse:+--defaults}
}

quack() {
  export NCKERNELS_QUACK=1
  "$python" -m nckernels info && "$python" -m pytest -q tests/test_quack.py || return
  suite campaign --only "nckernels triton" --out "$work/quack"
}

tests() {
  make test-gpu PY="$python" TEST_SECONDS="$TIME"
}

# Stages run in separate shells, which `timeout` can end.
export -f info build correctness again suite sanitize tune quack tests

say "$(date -u +%FT%TZ)  $run run, commit $(git describe --always --dirty 2>/dev/null || echo unknown)"
say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo 'no nvidia-smi')"
if [ -n "$bring" ]; then
  cp -r "$bring/extensions" "$work/extensions" || say "no libraries in $bring"
  export TORCH_EXTENSIONS_DIR=$work/extensions
  for wheel in "$bring"/wheels/*.whl; do
    "$python" -m zipfile -e "$wheel" "$work/rivals" || say "not unpacked: $wheel"
  done
  export PYTHONPATH=$PYTHONPATH:$work/rivals
fi

# All other stages run without quack, so that its effect is isolated.
export NCKERNELS_QUACK=0
[ -z "$quack" ] || export PYTHONPATH=$PYTHONPATH:$quack:$quack/nvidia_cutlass_dsl/dsl_packages

if [ "$run" = first ]; then
  stage info 30 info
  stage build 180 build
  stage correctness 80 'correctness correctness --processes "$processes"'
  stage campaign 120 'suite campaign --skip compile "M x M" "nckernels chunked"'
  stage launch 45 'suite launch --skip compile "M x M"'
  [ -z "$quack" ] || stage quack 60 quack
  stage memcheck 60 'sanitize memcheck'
else
  stage info 30 info
  stage build 180 build
  stage again 30 again
  stage tune 60 tune
  stage e2e 45 'suite e2e'
  [ -z "$quack" ] || stage quack 60 quack
  stage compiled 50 'suite campaign --only "nckernels triton" naive ${rehearse:+--skip compile}'
  stage memory 25 'suite memory --skip compile "M x M"'
  stage racecheck 30 'sanitize racecheck'
  stage tests 60 tests
fi

say "$(($(date +%s) - begin)) s in all"
# The most important parts come last, because a reader may see only the end. Tables omit quartiles, memory and errors.
{
  for log in memory launch compiled e2e campaign; do
    [ ! -f "$work/$log.log" ] || sed -n '/^ceilings/,/^written/p' "$work/$log.log" |
      sed -E 's/^(  .{44}) .{17}/\1/' | cut -c1-88
  done
  [ ! -f "$work/campaign.log" ] || grep '^|' "$work/campaign.log"  # measured next to predicted
  for log in tune memcheck racecheck correctness again; do
    [ ! -f "$work/$log.log" ] || { echo "$log:" && tail -n 25 "$work/$log.log" | cut -c1-200; }
  done
  cat "$out/summary.txt"
} >"$work/summary.txt"
mv "$work/summary.txt" "$out/summary.txt"
tail -c 11000 "$out/summary.txt"
exit $failed
