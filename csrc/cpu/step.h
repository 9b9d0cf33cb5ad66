// The CPU backend: its entry points, and the interface that every instruction set implements.
#pragma once

#include <cstdint>

#include "common/step.h"

namespace fastlangevin {
namespace cpu {

// How a step is divided into tiles of tile[0] x tile[1] along two of its dimensions. The tiles are
// so small that the buffers of one (4 x 8 KiB) stay in the first-level cache.
struct Tiling {
  int dims[2];  // the outer one is 0 for chains or -1 for none
  int64_t tile[2];
  int64_t counts[2];  // the number of tiles along them
  int64_t total;      // the number of tiles over all dimensions
};

constexpr int64_t kTile = 2048;

// The kernels of one instruction set. Each runs a range of the tiles of a step, or of the rows of
// kTile numbers of noise. The result does not depend on how the caller divides the work.
struct Kernels {
  void (*step)(const Step& step, const Tiling& tiling, int64_t first, int64_t last);
  void (*noise)(const Noise& noise, float* out, int64_t first, int64_t last);
};

extern const Kernels kBaseline;
#ifdef FASTLANGEVIN_X86
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// The kernels of the active instruction set.
const Kernels& step_kernels();

// The best instruction set that this processor runs, or the one that was chosen: "amx",
// "avx512_bf16", "avx512", "avx2" or "baseline".
const char* instruction_set();
// Chooses an instruction set by name, for tests, among them "amx_emulated", which runs everywhere.
// Returns false and changes nothing if it cannot run.
bool choose_instruction_set(const char* name);

void langevin_step(Step step, int threads);
void fill_noise(const Noise& noise, float* out, int threads);

}  // namespace cpu
}  // namespace fastlangevin
