// The entry points of the CPU backend: divides a step into tiles and distributes them over threads.
#include "cpu/step.h"

#include <algorithm>

#include "common/layout.h"
#include "cpu/parallel.h"

namespace fastlangevin {
namespace cpu {
namespace {

// With fewer elements per thread, waking a thread costs more than it saves (about 5 us, compared
// with 1 ns for each element drawn).
constexpr int64_t kElementsPerThread = 16384;

int64_t tiles(int64_t extent, int64_t tile) { return (extent + tile - 1) / tile; }

int64_t whole_blocks(int64_t elements) { return elements < 4 ? elements : elements / 4 * 4; }

// Columns follow the memory order of x. Rows run along the dimension in which the noise is
// contiguous, if the columns do not; otherwise along the next outer dimension, or over chains if
// one chain is small.
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
    // Operands in different orders are read roughly a square at a time, so that no order is slow.
    // Tiles end at the generator's blocks if the sizes allow it.
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

void langevin_step(Step step, int threads) {
  collapse(step);
  const int64_t size = step.shape[0] * step.elements();
  if (size == 0) return;
  const Tiling tiling = cut(step);
  const Kernels& kernels = step_kernels();
  parallel_for(tiling.total, useful_threads(size, threads),
               [&](int64_t first, int64_t last) { kernels.step(step, tiling, first, last); });
}

void fill_noise(const Noise& noise, float* out, int threads) {
  if (noise.chains == 0 || noise.elements == 0) return;
  const Kernels& kernels = step_kernels();
  const int64_t padded = (noise.elements + 3) / 4 * 4;
  const int64_t rows = 2 * noise.elements <= kTile ? tiles(noise.chains, kTile / padded)
                                                   : noise.chains * tiles(noise.elements, kTile);
  parallel_for(rows, useful_threads(noise.chains * noise.elements, threads),
               [&](int64_t first, int64_t last) { kernels.noise(noise, out, first, last); });
}

}  // namespace cpu
}  // namespace fastlangevin
