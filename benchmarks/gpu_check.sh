#!/usr/bin/env bash
# Everything worth knowing from a machine with a CUDA GPU, in one call: build, tests, sanitizer, speed.
#
#   benchmarks/gpu_check.sh [--out DIR] [--budget SECONDS] [--python PYTHON] [--rivals DIR] [--steps WORDS]
#
#   --out DIR         where everything goes (default out/gpu): summary.txt first, *.json and *.png, logs/ by step
#   --budget SECONDS  for the whole call (default 480); a step that does not fit any more is skipped and said so
#   --python PYTHON   an interpreter with torch and CUDA (default python3); pytest and matplotlib are wanted, not needed
#   --rivals DIR      wheels of rivals (liger-kernel, ...); unpacked without their dependencies under DIR/.unpacked
#   --steps WORDS     of: info build tests sanitizer quick launch memory full fp32 e2e tune
#                     (default all but tune, which rewrites nckernels/backends/triton/tuned)
#
# A step that fails is reported and the rest goes on. Exits with 1 if any step failed, 0 otherwise. Nothing of the
# GPU's settings is touched. NCKERNELS_* variables are passed on.
set -u

out=out/gpu budget=480 python=python3 rivals="" steps="info build tests sanitizer quick launch memory fp32 e2e full"
while [ $# -gt 0 ]; do
  [ $# -ge 2 ] || { echo "$0: the option $1 lacks its value" >&2; exit 2; }
  case $1 in
    --out) out=$2 ;;
    --budget) budget=$2 ;;
    --python) python=$2 ;;
    --rivals) rivals=$2 ;;
    --steps) steps=$2 ;;
    *) sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
  shift 2
done

cd "$(dirname "$0")/.." || exit 2
mkdir -p "$out/logs"
out=$(cd "$out" && pwd)
summary=$out/summary.txt
begin=$(date +%s)
failed=0
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$out/extensions}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

say() { echo "$*" | tee -a "$summary"; }
left() { echo $((budget - ($(date +%s) - begin))); }

# step NAME SHARE COMMAND...: under a timeout of SHARE percent of the budget, 20 s at least, or of what is left of it.
step() {
  local name=$1 limit=$(($2 * budget / 100)) start rc
  [ "$limit" -gt 20 ] || limit=20
  shift 2
  case " $steps " in *" $name "*) ;; *) return 0 ;; esac
  [ "$limit" -lt "$(left)" ] || limit=$(left)
  if [ "$limit" -lt 5 ]; then
    say "skipped  $name: the budget of $budget s is spent"
    return 0
  fi
  start=$(date +%s)
  # An interrupt lets Python say what it has found so far.
  LIMIT=$limit timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/logs/$name.log" 2>&1
  rc=$?
  case $rc in
    0) say "ok       $name ($(($(date +%s) - start)) s)" ;;
    77) say "skipped  $name: $(tail -n 1 "$out/logs/$name.log")" ;;
    124 | 137) failed=1; say "TIMEOUT  $name after $limit s: logs/$name.log" ;;
    *) failed=1; say "FAILED   $name (exit $rc): $(grep -v '^ *$' "$out/logs/$name.log" | tail -n 1 | cut -c1-160)" ;;
  esac
}

# suite NAME DTYPE SUITE ARGUMENTS...: what is left of the step's time, less what starting and plotting take.
suite() {
  local name=$1 dtype=$2 suite=$3
  shift 3
  "$python" -m benchmarks --device cuda --dtype "$dtype" --suite "$suite" --out "$out/$name" \
    --budget $((LIMIT * 8 / 10)) "$@"
}

info() {
  nvidia-smi || true
  "$python" -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())' || return 1
  "$python" -m nckernels info
}

build() {
  "$python" - <<'END'
import torch
from benchmarks import harness
from nckernels.backends import registry
try:
    registry.BACKENDS["cuda"].prepare()  # compiles, with as many processes as there are cores
except RuntimeError as error:
    print(error)
for dtype in (torch.bfloat16, torch.float32):
    harness.build(torch.device("cuda"), dtype)
states = registry.explain(torch.device("cuda"), torch.bfloat16)
print(*(f"{name}: {state}" for name, state in states.items()), sep="\n")
raise SystemExit(0 if states["triton"] == "ready" and states["cuda"] == "ready" else 1)
END
}

# As many of the GPU's tests as the time allows, in a random order that is always the same.
tests() {
  make test-gpu PY="$python" TEST_SECONDS=$((LIMIT * 7 / 10))
}

# The CUDA backend's kernels on ragged tiles, all directions: out of bounds, then races in shared memory.
sanitizer() {
  local tool
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer on the PATH"; return 77; }
  for tool in memcheck racecheck; do
    timeout $((LIMIT * 45 / 100)) compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" - <<'END' || { echo "compute-sanitizer --tool $tool: exit $?"; return 1; }
import torch
import nckernels
for dtype in (torch.bfloat16, torch.float32):
    for m, k, d in ((150, 133, 40), (70, 200, 320)):
        x = torch.randn(m, d, device="cuda", dtype=dtype, requires_grad=True)
        w = torch.randn(k, d, device="cuda", dtype=dtype, requires_grad=True)
        y = torch.randint(k, (m,), device="cuda")
        with nckernels.use_backend("cuda"):
            (nckernels.nonl_loss(x, w, y, direction="both") + nckernels.nonl_loss(x, w, y)).backward()
            nckernels.normface_loss(x, w, y).backward()
            nckernels.supcon_loss(x, y).backward()
torch.cuda.synchronize()
END
  done
}

# Functions run in a shell of their own, so that `timeout` can end them.
export -f info build tests sanitizer suite
export python out

: >"$summary"
say "$(date -u +%FT%TZ)  commit $(git describe --always --dirty 2>/dev/null || echo unknown)  budget $budget s"
say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo 'nvidia-smi: none')"
if [ -n "$rivals" ]; then
  for wheel in "$rivals"/*.whl; do
    "$python" -m zipfile -e "$wheel" "$rivals/.unpacked" || say "not unpacked: $wheel"
  done
  PYTHONPATH=$PYTHONPATH:$(cd "$rivals/.unpacked" && pwd)
fi

step info 5 bash -c info
step build 25 bash -c build
step quick 40 bash -c 'suite quick bfloat16 quick'
step tests 30 bash -c tests
step launch 8 bash -c 'suite launch bfloat16 launch --skip compile'
step sanitizer 15 bash -c sanitizer
step e2e 15 bash -c 'suite e2e bfloat16 e2e'
step fp32 12 bash -c 'suite fp32 float32 quick --only nckernels naive --skip compile'
step memory 10 bash -c 'suite memory bfloat16 memory --skip compile'
step tune 50 bash -c '"$python" -m benchmarks tune --budget $((LIMIT * 8 / 10))'
step full 60 bash -c 'suite full bfloat16 full --skip compile'

# Few files travel better than many.
(cd "$out" && find . -name '*.json' -o -name '*.png' -o -name '*.log' -o -name summary.txt |
  grep -v '^./extensions' | tar -czf report.tar.gz -T - 2>/dev/null)
say "$(($(date +%s) - begin)) s in all; everything is in $out"
for log in quick launch; do
  [ -f "$out/logs/$log.log" ] && sed -n '/^ceilings/,/^written/p' "$out/logs/$log.log" | grep -v 'absent:' | cut -c1-165 >>"$summary"
done
sed -n '/^ceilings/,$p' "$summary" | tail -n 90
exit $failed
