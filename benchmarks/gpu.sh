#!/usr/bin/env bash
# Builds, tests, sanitizes and benchmarks on a CUDA machine, in ten minutes and without a network:
#
#     benchmarks/gpu.sh OUT
#
# Installs this checkout (editable) into the environment of $PYTHON, by default python3, which must
# hold a CUDA build of torch with triton; numpy, safetensors, pillow, pyyaml, rich, scikit-learn and
# cyclopts; pytest, pytest-benchmark and, for the fuzz, hypothesis; pip, setuptools >= 77, cmake, ninja
# and pybind11. It also needs nvcc and a C++ compiler, and uses compute-sanitizer if it works. Writes
# gpu.log, tests.xml, chain-cuda.json, step-cuda.json, pytest-benchmark.json and summary.md to OUT.
# A failed stage does not stop the others. The exit status is 1 if a stage failed, and 2 if nothing
# could be run.
set -uo pipefail

BUDGET=570 # seconds in all

if [ $# -ne 1 ]; then
    echo "usage: benchmarks/gpu.sh OUT" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=$(command -v "${PYTHON:-python3}") || { echo "gpu.sh: no ${PYTHON:-python3}" >&2 && exit 2; }
# Its cmake and ninja are in the same folder, also if its environment has not been activated.
python_folder=$(cd "$(dirname "$python")" && pwd)
python=$python_folder/$(basename "$python")
export PATH=$python_folder:$PATH
log=$out/gpu.log
: >"$log"
failed=()

architecture=$("$python" -c '
import torch
if not torch.cuda.is_available():
    raise SystemExit("torch sees no CUDA device")
print("{}{}".format(*torch.cuda.get_device_capability()))' 2>>"$log")
if [ -z "$architecture" ]; then
    echo "gpu.sh: no CUDA device: $(tail -n 1 "$log")" >&2
    exit 2
fi

stage() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS left=$((BUDGET - SECONDS)) status first
    shift 2
    if [ "$left" -lt 5 ]; then
        echo "$name: not run, no time left"
        failed+=("$name")
        return
    fi
    [ "$limit" -le "$left" ] || limit=$left
    echo "=== $name: $*" >>"$log"
    first=$(wc -l <"$log")
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
    status=$?
    if [ $status -eq 0 ]; then
        echo "$name: passed in $((SECONDS - start)) s"
        return
    fi
    [ $status -ne 124 ] || echo "stopped after $limit s" >>"$log"
    echo "$name: FAILED ($status) after $((SECONDS - start)) s; the end of its output:"
    tail -n +"$((first + 1))" "$log" | tail -n 25
    failed+=("$name")
}

find_sanitizer() {
    command -v compute-sanitizer && return
    local candidate
    for candidate in "${CUDA_HOME:-/usr/local/cuda}"/{bin,compute-sanitizer}/compute-sanitizer; do
        [ ! -x "$candidate" ] || { echo "$candidate" && return; }
    done
}

# Prints why compute-sanitizer cannot run on this device; some virtual machines do not allow it.
why_no_sanitizer() { # SANITIZER
    local nvcc folder
    [ -n "$1" ] || { echo "compute-sanitizer not found" && return; }
    nvcc=$(PATH=${CUDA_HOME:-/usr/local/cuda}/bin:$PATH command -v nvcc) || return
    folder=$(mktemp -d)
    cat >"$folder/probe.cu" <<'END'
__global__ void write(int* to) { *to = 1; }
int main() {
  int* number = nullptr;
  if (cudaMalloc(&number, sizeof(int)) != cudaSuccess) return 1;
  write<<<1, 1>>>(number);
  return cudaDeviceSynchronize() == cudaSuccess ? 0 : 1;
}
END
    if ! { "$nvcc" -arch="sm_$architecture" -o "$folder/probe" "$folder/probe.cu" &&
        timeout 30 "$1" --error-exitcode 9 "$folder/probe"; } >"$folder/said" 2>&1; then
        echo "it fails on a trivial program: $(grep -m 1 -i 'error\|not supported' "$folder/said")"
    fi
    cat "$folder/said" >>"$log"
    rm -r "$folder"
}

# Triton must compile its kernels here and not interpret them.
unset TRITON_INTERPRET

FASTLANGEVIN_CUDA=1 CMAKE_CUDA_ARCHITECTURES=${CMAKE_CUDA_ARCHITECTURES:-$architecture} \
    stage build 150 "$python" -m pip install -e . --no-build-isolation --no-deps
# The tests of what runs on the device and of its references; the other tests need no device.
stage tests 240 "$python" -m pytest --junitxml="$out/tests.xml" tests/kernels/test_cuda.py \
    tests/kernels/test_triton_conv.py tests/kernels/test_triton.py tests/kernels/test_dispatch.py \
    tests/core/test_noise.py tests/core/test_step*.py tests/kernels/test_native.py \
    tests/kernels/test_fuzz.py

stage chains 150 "$python" -m benchmarks.chain --device cuda --out "$out" --seconds 3
stage steps 120 "$python" -m benchmarks.step --device cuda --out "$out" --seconds 0.3
# The variants timed above, at the most common size.
stage pytest-benchmark 75 "$python" -m pytest benchmarks -k "64x3x32x32-fp32-contiguous" \
    --benchmark-json="$out/pytest-benchmark.json" --benchmark-max-time=0.2

# After the benchmarks, which come first if time is short.
sanitizer=$(find_sanitizer)
reason=$(why_no_sanitizer "$sanitizer")
if [ -z "$reason" ]; then
    # First without the sanitizer, under which Triton's compiler would be much slower.
    stage kernels 90 "$python" -m benchmarks.sanitize
fi
for tool in memcheck racecheck initcheck; do
    if [ -z "$reason" ]; then
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" 90 \
            "$sanitizer" --tool "$tool" --error-exitcode 9 "$python" -m benchmarks.sanitize
    else
        echo "$tool: not run, $reason"
    fi
done

results=()
for file in "$out"/{chain,step}-cuda.json; do
    [ ! -f "$file" ] || results+=("$file")
done
if [ ${#results[@]} -ne 0 ]; then
    "$python" -m benchmarks.report "${results[@]}" >"$out/summary.md"
    "$python" -m benchmarks.report --short "${results[@]}"
fi
if [ ${#failed[@]} -ne 0 ]; then
    echo "gpu.sh: FAILED after $SECONDS s: ${failed[*]}; see $log"
    exit 1
fi
echo "gpu.sh: all stages passed in $SECONDS s"
