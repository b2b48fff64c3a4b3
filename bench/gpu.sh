#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under 8 minutes, with no network: `bash bench/gpu.sh`.
# Builds, runs the GPU tests and memcheck side by side, measures the suites with the GPU to themselves, and prints the
# tables last. A step that fails is in the record and in the exit code, and keeps nothing after it from running.
#   PYTHON                 the Python, with torch, Triton and the test packages; python3 unless set
#   OUT                    a folder that gets the record and the logs too
#   LT4REC_SPARSE_COMMIT   the commit of a tree that has no git; ends in -dirty if it is not that commit
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
LIMIT=455       # seconds for everything; the suites get what is left
INSTALL_LIMIT=120
TEST_LIMIT=150
TESTS=(
  tests/kernels/gpu/test_masked_matmul.py
  tests/kernels/gpu/test_block_sparse.py
  tests/kernels/gpu/test_fused_tail.py
  tests/nn/test_masked_gpu.py
  tests/nn/test_gpu.py
)
# Processes of each file, by how many kernels it compiles, 1 to 3 s each: 15 in all and memcheck's, for 16 cores.
WORKERS=(4 3 4 2 2)
logs=$(mktemp -d)
steps=$logs/steps.tsv
: >"$steps"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # in case the install fails: all but the CPU engine runs without it

# note NAME SECONDS CODE LAST: a line of the record.
note() {
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$(printf '%s' "$4" | tr '\t\r\n' '   ' | cut -c1-300)" >>"$steps"
  echo "== $1: code $3 after $2 s: $4"
}

# step NAME LIMIT COMMAND...: run, log, note; always succeeds.
step() {
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$logs/$name.log" 2>&1 || code=$?
  note "$name" $((SECONDS - start)) "$code" "$(tail -n 1 "$logs/$name.log")"
  if [ "$code" -ne 0 ]; then tail -n 25 "$logs/$name.log"; fi
}

# Memcheck on a few tests of each kernel. Memory comes from the driver, not from torch's pool: what is beyond a tensor
# is then beyond an allocation. Where the tool is absent, or does not take this GPU, that is noted and no failure.
memcheck() {
  local start=$SECONDS code=0 tool ids=() file
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1 || true)
  if [ -z "$tool" ]; then
    note memcheck 0 0 "compute-sanitizer is absent"
    return
  fi
  mapfile -t ids < <(collected tests/kernels/gpu/test_masked_matmul.py | grep short | awk 'NR % 3 == 1' | head -n 12)
  for file in "${TESTS[@]:1:2}"; do
    if [ -e "$file" ]; then
      mapfile -t -O "${#ids[@]}" ids < <(collected "$file" | awk 'NR % 17 == 1' | head -n 4)
    fi
  done
  if [ "${#ids[@]}" -eq 0 ]; then
    note memcheck $((SECONDS - start)) 1 "no test was collected"
    return
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after=10 "$TEST_LIMIT" \
    "$tool" --tool memcheck --error-exitcode 9 "$PYTHON" -m pytest -q -W default -p no:cacheprovider "${ids[@]}" \
    >"$logs/memcheck.log" 2>&1 || code=$?
  if grep -qi "device not supported" "$logs/memcheck.log"; then
    note memcheck $((SECONDS - start)) 0 "compute-sanitizer says: Device not supported"
    return
  fi
  note memcheck $((SECONDS - start)) "$code" "${#ids[@]} tests: $(grep "ERROR SUMMARY" "$logs/memcheck.log" | tail -n 1)"
  if [ "$code" -ne 0 ]; then tail -n 25 "$logs/memcheck.log"; fi
}

collected() {
  { "$PYTHON" -m pytest -q --collect-only -W default -p no:cacheprovider "$1" 2>/dev/null || true; } | { grep '::' || true; }
}

step gpu 60 "$PYTHON" -c "
import platform, torch
assert torch.cuda.is_available(), 'torch sees no GPU'
import numpy, triton
print(torch.cuda.get_device_name(), 'Python', platform.python_version(), 'torch', torch.__version__,
      'CUDA', torch.version.cuda, 'Triton', triton.__version__, 'NumPy', numpy.__version__)"
if ! awk -F'\t' '$1 == "gpu" && $3 != 0 { exit 1 }' "$steps"; then
  echo "no GPU: nothing to measure" >&2
  exit 2
fi
step install "$INSTALL_LIMIT" "$PYTHON" -m pip install -q -e . --no-build-isolation --no-deps

# Side by side: they wait for the compiler most of the time. A file has processes of its own, for an illegal access ends
# CUDA for all that follows in one. The tests ask torch for deterministic algorithms, which cuBLAS has in a workspace of
# fixed size alone. The warnings of these versions say nothing of the kernels.
has_xdist=0
if "$PYTHON" -c "import xdist" 2>/dev/null; then has_xdist=1; fi
for i in "${!TESTS[@]}"; do
  file=${TESTS[$i]}
  spread=()
  if [ "$has_xdist" = 1 ]; then spread=(-n "${WORKERS[$i]}" --dist worksteal); fi
  if [ -e "$file" ]; then
    # One thread each, or 16 processes of 16 threads wait for each other.
    OMP_NUM_THREADS=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 step "$(basename "$file" .py)" "$TEST_LIMIT" \
      "$PYTHON" -m pytest -q -W default -p no:cacheprovider ${spread[@]+"${spread[@]}"} "$file" &
  fi
done
OMP_NUM_THREADS=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 memcheck &
wait

# An installed package of the name would hide the folder tests, which the suites take their oracle from.
if ! "$PYTHON" -c "import tests.oracle" 2>/dev/null; then
  mkdir -p "$logs/path/tests"
  cp tests/oracle.py "$logs/path/tests/"
  : >"$logs/path/tests/__init__.py"
  export PYTHONPATH=$logs/path:$PYTHONPATH
fi
left=$((LIMIT - SECONDS))
code=0
"$PYTHON" -m bench gpu --seconds $((left > 60 ? left : 60)) --steps "$steps" \
  >"$logs/suites.log" 2>"$logs/suites.err" || code=$?
tail -n 20 "$logs/suites.err" >&2
cat "$logs/suites.log"
if [ -n "${OUT:-}" ]; then
  mkdir -p "$OUT"
  cat "$logs"/*.log "$logs/suites.err" >"$OUT/logs.txt"
  written=$(grep -m 1 '\.json$' "$logs/suites.log" || true)
  if [ -n "$written" ]; then cp "$written" "$OUT/"; fi
fi
rm -rf "$logs"
exit "$code"
