#!/usr/bin/env bash
# Builds, checks and measures the fused engine's products by tiles on a CPU with AMX, without a
# network, in ten minutes or in AMX_SECONDS:
#
#     benchmarks/amx.sh OUT [STAGE ...]
#     benchmarks/amx.sh --dry-run OUT [STAGE ...]
#
# Needs what gpu.sh needs, without CUDA, triton and nvcc. Stages, their results and the exit status
# are as there: OUT/stages.tsv and OUT/amx.log. What OUT/chain-T says of "fused bf16", "fused tf32"
# (bf16x3), "fused fp32" (bf16x6 where that is estimated to be faster) and of both "by vectors" is
# measured beside the paper's loop and the explicit engine, with T threads, as is the share of the
# rate of torch's product of random matrices.
#
# --dry-run needs no AMX. Each stage runs in its smallest form, or is only printed if it has none.
set -uo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
open_run amx.sh "${AMX_SECONDS:-590}" "$@" # seconds in all

if [ -z "$dry" ] && ! grep -qw amx_bf16 /proc/cpuinfo; then
    echo "amx.sh: no AMX: /proc/cpuinfo has no flag amx_bf16" >&2
    exit 2
fi
quick=()
[ -z "$dry" ] || quick=(--quick)

device_stage build 120 "$python" -m pip install -e . --no-build-isolation --no-deps
stage doctor 20 "$python" -m fastlangevin doctor

# The emulation against the processor's tiles, bit for bit: single products, and whole networks.
flags=(-mamx-tile -mamx-bf16 -DFASTLANGEVIN_AMX)
[ -z "$dry" ] || flags=()
stage compile 20 "${CXX:-c++}" -std=c++17 -O1 -ffp-contract=off -Wno-psabi "${flags[@]}" -Icsrc \
    -o "$out/test_tiles" csrc/tests/test_tiles.cpp csrc/cpu/tile_permission.cpp
stage tiles 10 "$out/test_tiles"
only=()
[ -z "$dry" ] || only=(--collect-only)
stage tests 60 "$python" -m pytest -v -p no:cacheprovider "${only[@]}" \
    --junitxml="$out/tests.xml" tests/gradients/test_amx.py

stage limits 15 "$python" -m benchmarks.limits --device cpu --out "$out" "${quick[@]}"

# A round takes some 6 s at width 64, most of it in the loop.
chosen=(--steps 5 --seconds 10)
[ -z "$dry" ] || chosen=(--variants "explicit fp32")
for threads in 1 2; do
    stage "chains-$threads" $((105 - 25 * threads)) "$python" -m benchmarks.chain --threads "$threads" \
        --batches 64 --out "$out/chain-$threads" "${chosen[@]}" "${quick[@]}"
done
chosen=(--steps 5 --seconds 2 --variants "explicit bf16" "fused bf16" "fused tf32" "fused fp32")
[ -z "$dry" ] || chosen=(--variants "explicit fp32")
stage small-batches 35 "$python" -m benchmarks.chain --threads 1 --batches 4 16 \
    --out "$out/small-batches" "${chosen[@]}" "${quick[@]}"
chosen=(--steps 5 --seconds 1 --precision bf16 --only residual "wide residual, label" "MLP 2-128-128-1")
[ -z "$dry" ] || chosen=(--seconds 0 --only "MLP 2-128-128-1")
stage networks 60 "$python" -m benchmarks.networks --threads 1 --json "$out/networks-cpu.json" \
    "${chosen[@]}" "${quick[@]}"
for threads in 1 2; do
    stage "iteration-$threads" 50 "$python" -m benchmarks.iteration --threads "$threads" --rounds 3 \
        --out "$out/iteration-$threads" "${quick[@]}"
done

close_run
