// The CPU backend's entry points: how a step is cut into tiles, who runs them, and with which
// instruction set.
#include "step_cpu.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "convnet_cpu.h"
#include "layout.h"
#include "parallel.h"

namespace fastlangevin {
namespace cpu {
namespace {

// Below this many elements a thread, waking one costs more than it saves (about 5 us against 1 ns
// an element drawn).
constexpr int64_t kElementsPerThread = 16384;

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  const ConvKernels* conv_kernels;
  bool (*runs_here)();
};

#ifdef FASTLANGEVIN_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") != 0;
}
#endif

// Best first.
const InstructionSet kInstructionSets[] = {
#ifdef FASTLANGEVIN_X86
    {"avx512_bf16", &kAvx512, &kConvAvx512Bf16,
     [] { return has_avx512() && __builtin_cpu_supports("avx512bf16") != 0; }},
    {"avx512", &kAvx512, &kConvAvx512, has_avx512},
    {"avx2", &kAvx2, &kConvAvx2,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c") != 0;
     }},
#endif
    {"baseline", &kBaseline, &kConvBaseline, [] { return true; }},
};

const InstructionSet* best() {
  for (const InstructionSet& set : kInstructionSets) {
    if (set.runs_here()) return &set;
  }
  return nullptr;
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set{best()};
  return set;
}

int64_t tiles(int64_t extent, int64_t tile) { return (extent + tile - 1) / tile; }

int64_t whole_blocks(int64_t elements) { return elements < 4 ? elements : elements / 4 * 4; }

// Columns run along x's memory; rows along the noise's order where that is another one, else along
// the next dimension, or over chains where these are small.
Tiling cut(const Step& step) {
  Tiling tiling{{-1, -1}, {1, 1}, {1, 1}, 1};
  const int inner = step.dims - 1;
  const int64_t columns = inner > 0 ? step.shape[inner] : 1;
  if (inner > 0) tiling.dims[1] = inner;
  if (inner <= 1 && 2 * columns <= kTile) {
    tiling.dims[0] = 0;
    tiling.tile[0] = kTile / ((columns + 3) / 4 * 4);
    tiling.tile[1] = columns;
  } else if (inner <= 1) {
    tiling.tile[1] = kTile;
  } else {
    tiling.dims[0] = inner - 1;
    for (int d = 1; step.draw && d < inner; ++d) {
      if (step.positions[d] == 1) tiling.dims[0] = d;
    }
    // Operands in several orders are read about a square at a time, so that no order is slow; cuts
    // fall between the generator's blocks where the sizes allow.
    tiling.tile[1] = std::min<int64_t>(columns, 64);
    tiling.tile[0] = std::min(step.shape[tiling.dims[0]], whole_blocks(kTile / tiling.tile[1]));
    tiling.tile[1] = std::min(columns, whole_blocks(kTile / tiling.tile[0]));
  }
  for (int d = 0; d < step.dims; ++d) {
    int64_t parts = step.shape[d];
    for (int k = 0; k < 2; ++k) {
      if (tiling.dims[k] == d) parts = tiling.counts[k] = tiles(step.shape[d], tiling.tile[k]);
    }
    tiling.total *= parts;
  }
  return tiling;
}

int useful_threads(int64_t elements, int threads) {
  const int64_t most = elements / kElementsPerThread + 1;
  return most < threads ? static_cast<int>(most) : threads;
}

}  // namespace

const ConvKernels& conv_kernels() { return *chosen().load()->conv_kernels; }

const char* instruction_set() { return chosen().load()->name; }

bool choose_instruction_set(const char* name) {
  for (const InstructionSet& set : kInstructionSets) {
    if (std::strcmp(set.name, name) == 0 && set.runs_here()) {
      chosen().store(&set);
      return true;
    }
  }
  return false;
}

void langevin_step(Step step, int threads) {
  collapse(step);
  const int64_t size = step.shape[0] * step.elements();
  if (size == 0) return;
  const Tiling tiling = cut(step);
  const Kernels& kernels = *chosen().load()->kernels;
  parallel_for(tiling.total, useful_threads(size, threads),
               [&](int64_t first, int64_t last) { kernels.step(step, tiling, first, last); });
}

void fill_noise(const Noise& noise, float* out, int threads) {
  if (noise.chains == 0 || noise.elements == 0) return;
  const Kernels& kernels = *chosen().load()->kernels;
  const int64_t padded = (noise.elements + 3) / 4 * 4;
  const int64_t rows = 2 * noise.elements <= kTile ? tiles(noise.chains, kTile / padded)
                                                   : noise.chains * tiles(noise.elements, kTile);
  parallel_for(rows, useful_threads(noise.chains * noise.elements, threads),
               [&](int64_t first, int64_t last) { kernels.noise(noise, out, first, last); });
}

}  // namespace cpu
}  // namespace fastlangevin
