// The CPU backend: entry points, and what the instruction sets provide to them.
#pragma once

#include <cstdint>

#include "common/step.h"

namespace fastlangevin {
namespace cpu {

// How a step is cut: into tiles of tile[0] x tile[1] along two of its dimensions, small enough that
// the buffers a tile needs stay in the first-level cache (4 x 8 KiB).
struct Tiling {
  int dims[2];        // the outer one is 0 for chains, or -1 for none
  int64_t tile[2];
  int64_t counts[2];  // of tiles
  int64_t total;      // over all dimensions
};

constexpr int64_t kTile = 2048;

// One instruction set's kernels. Each runs a range of the tiles (of a step) or of the rows of kTile
// numbers (of noise), so that the caller may share the work out in any way: the results are equal.
struct Kernels {
  void (*step)(const Step& step, const Tiling& tiling, int64_t first, int64_t last);
  void (*noise)(const Noise& noise, float* out, int64_t first, int64_t last);
};

extern const Kernels kBaseline;
#ifdef FASTLANGEVIN_X86
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// Those of the instruction set in use.
const Kernels& step_kernels();

// "avx512", "avx2" or "baseline": the best this processor runs, or what was chosen.
const char* instruction_set();
// Chooses one by name (for tests); false, with nothing changed, where it cannot run here.
bool choose_instruction_set(const char* name);

void langevin_step(Step step, int threads);
void fill_noise(const Noise& noise, float* out, int threads);

}  // namespace cpu
}  // namespace fastlangevin
