#!/usr/bin/env bash
# Builds, checks, tests, sanitizes and benchmarks on a CUDA machine, without a network, in nine
# minutes or in GPU_SECONDS:
#
#     benchmarks/gpu.sh OUT [STAGE ...]
#     benchmarks/gpu.sh --dry-run OUT [STAGE ...]
#
# Installs this checkout (editable) into the environment of $PYTHON, by default python3, which must
# hold a CUDA build of torch with triton; numpy, safetensors, pillow, pyyaml, rich, scikit-learn and
# cyclopts; pytest, pytest-benchmark and, for tests in parallel, pytest-xdist; pip, setuptools >= 77,
# cmake, ninja and pybind11. It also needs nvcc and a C++ compiler, and uses compute-sanitizer and
# ncu if they work.
#
# Every stage writes its results to OUT as it goes, and is stopped at its own time limit; a failed
# stage does not stop the others. The stages that matter most come first; with names of stages, only
# these run. OUT/stages.tsv has a line
# for each with its status and seconds, and OUT/gpu.log what they printed. The exit status is 1 if a
# stage failed, and 2 if nothing could be run.
#
# --dry-run needs no GPU. Each stage runs in its smallest form on the CPU, with Triton's kernels
# interpreted, or is only printed if it has none (build, ncu, learning); a program or a file that a
# command names and that is missing is a failure.
set -uo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
open_run gpu.sh "${GPU_SECONDS:-505}" "$@" # seconds in all

if [ -n "$dry" ]; then
    architecture=90
    device=(--device cpu --quick)
    export TRITON_INTERPRET=1
else
    architecture=$("$python" -c '
import torch
if not torch.cuda.is_available():
    raise SystemExit("torch sees no CUDA device")
print("{}{}".format(*torch.cuda.get_device_capability()))' 2>>"$log")
    if [ -z "$architecture" ]; then
        echo "gpu.sh: no CUDA device: $(tail -n 1 "$log")" >&2
        exit 2
    fi
    device=(--device cuda)
    # Triton must compile its kernels here and not interpret them.
    unset TRITON_INTERPRET
fi

find_tool() { # NAME
    command -v "$1" && return
    local candidate
    for candidate in "${CUDA_HOME:-/usr/local/cuda}"/{bin,compute-sanitizer}/"$1"; do
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
        timeout 10 "$1" --error-exitcode 9 "$folder/probe"; } >"$folder/said" 2>&1; then
        echo "it fails on a trivial program: $(grep -m 1 -i 'error\|not supported' "$folder/said")"
    fi
    cat "$folder/said" >>"$log"
    rm -r "$folder"
}

stage limits 10 "$python" -m benchmarks.limits "${device[@]}" --out "$out"

# The build beside the compilation of the fused engine's kernels, which needs no extension and must
# not slow the build down.
if [ -z "$dry" ] && is_wanted triton-cache; then
    setsid nice -n 19 "$python" -m benchmarks.fused_step "${device[@]}" --widths 64 32 128 \
        --batches 64 256 1024 --precisions fp16 tf32 --odd >"$out/triton-cache.log" 2>&1 &
    filling=$!
fi
FASTLANGEVIN_CUDA=1 CMAKE_CUDA_ARCHITECTURES=${CMAKE_CUDA_ARCHITECTURES:-$architecture} \
    device_stage build 55 "$python" -m pip install -e . --no-build-isolation --no-deps
if [ -z "$dry" ] && is_wanted triton-cache; then
    stage triton-cache 25 tail --pid="$filling" -f /dev/null # waits for the rest of it
    kill -- "-$filling" 2>/dev/null # with its workers
    if ! wait "$filling"; then
        echo "triton-cache: FAILED; see $out/triton-cache.log"
        record triton-cache "failed or cut" 0
    fi
elif [ -n "$dry" ]; then
    stage triton-cache 20 "$python" -m benchmarks.fused_step "${device[@]}" --precisions fp16
fi

stage checks 20 "$python" -m benchmarks.device_checks "${device[@]}" --out "$out"

# The tests of what runs on the device. Each prints its line as it ends, for a run that is cut.
several=()
if [ -z "$dry" ] && "$python" -c 'import xdist' 2>>"$log"; then several=(-n 12); fi
only=()
[ -z "$dry" ] || only=(--collect-only)
breaks_a_capture=tests/kernels/test_cuda.py::test_a_failed_recording_leaves_torch_as_it_was
stage tests 60 "$python" -m pytest -v -p no:cacheprovider "${several[@]}" "${only[@]}" \
    --junitxml="$out/tests.xml" --deselect "$breaks_a_capture" tests/kernels/test_cuda.py \
    tests/kernels/test_triton_conv.py tests/kernels/test_triton.py tests/distributed/test_nccl.py
# Alone and last, since a capture that fails may leave its process in an unknown state.
stage failed-capture 15 "$python" -m pytest -v -p no:cacheprovider "${only[@]}" "$breaks_a_capture"

if [ -n "$dry" ]; then
    stage memcheck 25 "$python" -m benchmarks.sanitize "${device[@]}"
    device_stage racecheck 25 "$python" -m benchmarks.sanitize
else
    sanitizer=$(find_tool compute-sanitizer)
    reason=
    if is_wanted memcheck || is_wanted racecheck; then reason=$(why_no_sanitizer "$sanitizer"); fi
    # First without the sanitizer, under which Triton's compiler would be much slower.
    [ -n "$reason" ] || stage kernels 35 "$python" -m benchmarks.sanitize
    for tool in memcheck racecheck; do
        is_wanted "$tool" || continue
        if [ -z "$reason" ]; then
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" 25 \
                "$sanitizer" --tool "$tool" --error-exitcode 9 "$python" -m benchmarks.sanitize
        else
            echo "$tool: not run, $reason"
            record "$tool" "not run: $reason" 0
        fi
    done
fi

# The paper's loop beside these, with its K = 100: batch 64 first, widths 64, 32 and 128.
chosen=(--steps 100 --seconds 2
    --variants "explicit tf32" "fused tf32" "explicit fp16" "fused fp16")
[ -z "$dry" ] || chosen=(--variants "explicit fp32")
stage chains 80 "$python" -m benchmarks.chain "${device[@]}" --out "$out" "${chosen[@]}"

# The same for networks in the manner of other people's code. Those with labels or observations, and
# the spectral norm by hand, are replayed traces.
chosen=(--steps 20 --seconds 0.5 --precision tf32 fp16 --only residual "wide residual, label"
    "scale and shift by class" "action given vector" "residual, spectral norm by hand"
    "wide residual, GroupNorm, SiLU" "MLP 2-128-128-1" "Swish tutorial")
[ -z "$dry" ] || chosen=(--seconds 0 --only "action given vector" "MLP 2-128-128-1")
stage networks 40 "$python" -m benchmarks.networks "${device[@]}" \
    --json "$out/networks-${device[1]}.json" "${chosen[@]}"

profiler=$(find_tool ncu)
if [ -n "$dry" ] || [ -n "$profiler" ]; then
    # One line per kernel and metric: time, bytes from memory and from L2, and the tensor pipe.
    device_stage profile 30 "${profiler:-ncu}" --clock-control none --csv --log-file "$out/ncu.csv" --metrics \
"gpu__time_duration.sum,dram__bytes.sum,lts__t_bytes.sum,\
sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active" \
        "$python" -m benchmarks.fused_step --widths 64 --precisions fp16
else
    echo "profile: not run, ncu not found"
    record profile "not run: ncu not found" 0
fi

# Steps of every size in float32 beside a copy of as many bytes.
chosen=(--only fp32-contiguous --seconds 0.3 --no-compile)
[ -z "$dry" ] || chosen=()
stage steps 20 "$python" -m benchmarks.step "${device[@]}" --out "$out" "${chosen[@]}"
stage chain-memory 25 "$python" -m benchmarks.chain_memory "${device[@]}" --out "$out"
stage capacity 40 "$python" -m benchmarks.capacity "${device[@]}" --out "$out" --seconds 35
# The convolutions in Gluon beside the engine's, launch by launch, and both with early launches.
device_stage patches 35 "$python" -m benchmarks.patches --out "$out"

# In all the time that is left. A run that is stopped saves a checkpoint.
if [ -n "$dry" ] || [ -d "${FASTLANGEVIN_DATA:-data}/cifar10" ]; then
    device_stage learning "$BUDGET" "$python" -m fastlangevin train --config paper-cifar10 \
        --data "${FASTLANGEVIN_DATA:-data}/cifar10" --out "$out/cifar10" --width 32 --iterations 300
else
    echo "learning: not run, no CIFAR-10 in \$FASTLANGEVIN_DATA"
    record learning "not run: no data" 0
fi

if [ -s "$out/ncu.csv" ]; then
    "$python" -m benchmarks.traffic --ncu "$out/ncu.csv" --out "$out" >>"$log" 2>&1
fi
results=()
for file in "$out"/{chain,networks,step,chain_memory}-*.json; do
    [ ! -f "$file" ] || results+=("$file")
done
if [ ${#results[@]} -ne 0 ]; then
    "$python" -m benchmarks.report "${results[@]}" >"$out/summary.md" 2>>"$log"
    [ -n "$dry" ] || "$python" -m benchmarks.report --short "${results[@]}"
fi
close_run
