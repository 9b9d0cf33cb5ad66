// The CPU kernels of one instruction set, FASTLANGEVIN_ISA. This file is compiled once for each.
//
// A tile of a step passes through buffers in the first-level cache. Its normals are drawn in
// logical order, four per Philox block, and transposed to x's order; operands that are not float32
// in this order are converted to it; then one loop over float32 does the arithmetic. The same loop
// handles every dtype and layout, and each buffer costs a load and a store per element.
#include "cpu/draw.h"
#include "cpu/tile.h"

namespace fastlangevin {
namespace FASTLANGEVIN_ISA {
namespace {

using cpu::Tiling;

// The first index of a tile in every dimension, and its extent.
struct Place {
  int64_t index[kMaxDims];
  int64_t rows, columns;

  Place(const Step& step, const Tiling& tiling, int64_t number) {
    int64_t cut[2];
    for (int k = 1; k >= 0; --k) {
      cut[k] = number % tiling.counts[k] * tiling.tile[k];
      number /= tiling.counts[k];
    }
    for (int d = step.dims - 1; d >= 0; --d) {
      index[d] = 0;
      if (d == tiling.dims[0] || d == tiling.dims[1]) continue;
      index[d] = number % step.shape[d];
      number /= step.shape[d];
    }
    int64_t extent[2] = {1, 1};
    for (int k = 0; k < 2; ++k) {
      if (tiling.dims[k] < 0) continue;
      index[tiling.dims[k]] = cut[k];
      const int64_t left = step.shape[tiling.dims[k]] - cut[k];
      extent[k] = left < tiling.tile[k] ? left : tiling.tile[k];
    }
    rows = extent[0], columns = extent[1];
  }

  int64_t offset(const Step& step, const int64_t* strides) const {
    int64_t sum = 0;
    for (int d = 0; d < step.dims; ++d) sum += index[d] * strides[d];
    return sum;
  }
  Tile tile(const Tiling& tiling, const int64_t* strides) const {
    const int64_t row_stride = tiling.dims[0] < 0 ? 0 : strides[tiling.dims[0]];
    const int64_t column_stride = tiling.dims[1] < 0 ? 1 : strides[tiling.dims[1]];
    return Tile{rows, columns, row_stride, column_stride}.merged();
  }
};

struct Buffers {
  alignas(64) float x[kTile], grad[kTile], noise[kTile], spare[kTile];
};

// A tile of an operand as contiguous float32: the operand itself if it is that, else the buffer.
float* fetch(const Operand& operand, const Step& step, const Tiling& tiling, const Place& place,
             float* buffer) {
  if (operand.data == nullptr) return buffer;
  const int64_t offset = place.offset(step, operand.strides);
  const Tile tile = place.tile(tiling, operand.strides);
  if (operand.dtype == Dtype::kFloat32 && tile.contiguous()) {
    return static_cast<float*>(operand.data) + offset;
  }
  with_dtype(operand.dtype,
             [&](auto d) { read_tile<decltype(d)::value>(operand.data, offset, tile, buffer); });
  return buffer;
}

void put(const Operand& operand, const Step& step, const Tiling& tiling, const Place& place,
         const float* values) {
  const int64_t offset = place.offset(step, operand.strides);
  const Tile tile = place.tile(tiling, operand.strides);
  with_dtype(operand.dtype,
             [&](auto d) { write_tile<decltype(d)::value>(values, tile, operand.data, offset); });
}

// Draws the normals of a tile, in x's order.
void draw_tile(const Step& step, const Noise& noise, const Keys& keys, const Tiling& tiling,
               const Place& place, Buffers& buffers) {
  const uint32_t chain = step.first_chain + static_cast<uint32_t>(place.index[0]);
  const int64_t first = place.offset(step, step.positions);
  const Tile tile = place.tile(tiling, step.positions);
  if (tiling.dims[0] == 0) {
    draw_chains(noise, keys, chain, place.rows, buffers.spare, buffers.noise);
  } else if (tile.column_stride == 1) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      draw_span(noise, keys, chain, first + r * tile.row_stride, tile.columns,
                buffers.noise + r * tile.columns);
    }
  } else {
    // The rows are neighbours in logical order, so draw along them and then transpose.
    for (int64_t c = 0; c < tile.columns; ++c) {
      draw_span(noise, keys, chain, first + c * tile.column_stride, tile.rows, buffers.spare);
      for (int64_t r = 0; r < tile.rows; ++r) {
        buffers.noise[r * tile.columns + c] = buffers.spare[r];
      }
    }
  }
}

// Steps count elements that share a and b.
template <bool kGrad, bool kNoise, bool kNoiseLast>
void update(float* x, const float* g, const float* z, float a, float b, const Bounds& bounds,
            int64_t count) {
  const Float va = Vector::broadcast(a), vb = Vector::broadcast(b), none = {};
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    const Float vg = kGrad ? Vector::load(g + k) : none;
    const Float vz = kNoise ? Vector::load(z + k) : none;
    Vector::store(x + k, langevin<Vector, kGrad, kNoise, kNoiseLast>(Vector::load(x + k), vg, vz,
                                                                     va, vb, bounds));
  }
  for (; k < count; ++k) {
    x[k] = langevin<Scalar, kGrad, kNoise, kNoiseLast>(x[k], kGrad ? g[k] : 0.0f,
                                                       kNoise ? z[k] : 0.0f, a, b, bounds);
  }
}

void step_tiles(const Step& step, const Tiling& tiling, int64_t first, int64_t last) {
  Buffers buffers;
  const Bounds bounds(step);
  const Noise noise{step.seed,     step.step,     kLangevin,      step.first_chain,
                    Fill::kNormal, step.shape[0], step.elements()};
  const Keys keys(noise.seed);
  with_form(step, [&](auto grad, auto noisy, auto noise_last) {
    constexpr bool kGrad = decltype(grad)::value, kNoise = decltype(noisy)::value;
    for (int64_t number = first; number < last; ++number) {
      const Place place(step, tiling, number);
      const float* g = fetch(step.grad, step, tiling, place, buffers.grad);
      const float* z = fetch(step.noise, step, tiling, place, buffers.noise);
      if (step.draw) draw_tile(step, noise, keys, tiling, place, buffers);
      float* x = fetch(step.x, step, tiling, place, buffers.x);
      const bool by_row = tiling.dims[0] == 0 && (step.scales || step.noise_stds);
      const int64_t rows = by_row ? place.rows : 1;
      const int64_t count = place.rows * place.columns / rows;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t chain = place.index[0] + r, at = r * count;
        const float a =
            step.scales ? step.scale * step.scales[chain * step.scales_stride] : step.scale;
        const float b =
            step.noise_stds ? step.noise_stds[chain * step.noise_stds_stride] : step.noise_std;
        update<kGrad, kNoise, decltype(noise_last)::value>(x + at, g + at, z + at, a, b, bounds,
                                                           count);
      }
      if (x == buffers.x) put(step.x, step, tiling, place, x);
    }
  });
}

void noise_rows(const Noise& noise, float* out, int64_t first, int64_t last) {
  const Keys keys(noise.seed);
  if (noise.elements * 2 <= kTile) {  // rows of small chains
    float spare[kTile];
    const int64_t each = kTile / ((noise.elements + 3) / 4 * 4);
    for (int64_t row = first; row < last; ++row) {
      const int64_t chain = row * each;
      const int64_t left = noise.chains - chain;
      draw_chains(noise, keys, noise.first_chain + static_cast<uint32_t>(chain),
                  left < each ? left : each, spare, out + chain * noise.elements);
    }
    return;
  }
  const int64_t pieces = (noise.elements + kTile - 1) / kTile;
  for (int64_t row = first; row < last; ++row) {
    const int64_t chain = row / pieces, at = row % pieces * kTile;
    const int64_t left = noise.elements - at;
    draw_span(noise, keys, noise.first_chain + static_cast<uint32_t>(chain), at,
              left < kTile ? left : kTile, out + chain * noise.elements + at);
  }
}

}  // namespace
}  // namespace FASTLANGEVIN_ISA

namespace cpu {
const Kernels FASTLANGEVIN_KERNELS = {FASTLANGEVIN_ISA::step_tiles, FASTLANGEVIN_ISA::noise_rows};
}  // namespace cpu
}  // namespace fastlangevin
