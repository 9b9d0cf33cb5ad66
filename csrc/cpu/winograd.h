// Passes by minimal filtering: transforms of tiles, and products between them.
#pragma once

#include "cpu/products.h"

namespace fastlangevin {
namespace FASTLANGEVIN_ISA {
namespace {

// F(n, r) along one axis: kInputs inputs to as many factors, and the sums of products to n outputs.
template <int kTaps>
struct Axis;

template <>
struct Axis<1> {
  static constexpr int kInputs = 1, kOutputs = 1;
  static FASTLANGEVIN_INLINE void factors(const Float* d, int, Float* v, int) { v[0] = d[0]; }
  static FASTLANGEVIN_INLINE void outputs(const Float* m, int, Float* y, int) { y[0] = m[0]; }
};

template <>
struct Axis<2> {
  static constexpr int kInputs = 3, kOutputs = 2;
  static FASTLANGEVIN_INLINE void factors(const Float* d, int s, Float* v, int t) {
    v[0] = d[0] - d[s], v[t] = d[s], v[2 * t] = d[2 * s] - d[s];
  }
  static FASTLANGEVIN_INLINE void outputs(const Float* m, int s, Float* y, int t) {
    y[0] = m[0] + m[s], y[t] = m[s] + m[2 * s];
  }
};

template <>
struct Axis<3> {
  static constexpr int kInputs = 4, kOutputs = 2;
  static FASTLANGEVIN_INLINE void factors(const Float* d, int s, Float* v, int t) {
    v[0] = d[0] - d[2 * s], v[t] = d[s] + d[2 * s];
    v[2 * t] = d[2 * s] - d[s], v[3 * t] = d[s] - d[3 * s];
  }
  static FASTLANGEVIN_INLINE void outputs(const Float* m, int s, Float* y, int t) {
    y[0] = m[0] + m[s] + m[2 * s], y[t] = m[s] - m[2 * s] - m[3 * s];
  }
};

// The tiles of a block: where each reads, and where its outputs go.
struct TileBlock {
  const float* from[WinogradTiles::kMost];
  int64_t to[WinogradTiles::kMost * 4];
  int count;
};

// Writes factors[product][tile][channel of each phase].
template <class Y, class X>
void transform_inputs(const ConvPass& pass, const TileBlock& block, float* factors) {
  const WinogradTiles& tiles = pass.tiles;
  constexpr int kTall = Y::kInputs, kWide = X::kInputs;
  const int64_t product = tiles.block * tiles.row;
  for (int k = 0; k < block.count; ++k) {
    float* to = factors + k * tiles.row;
    for (const int32_t phase : tiles.phases) {
      for (int64_t c = 0; c < pass.in; c += kLanes) {
        const float* from = block.from[k] + phase + c;
        Float columns[kTall][kWide];
        for (int x = 0; x < kWide; ++x) {
          Float inputs[kTall];
          for (int y = 0; y < kTall; ++y) {
            inputs[y] = Vector::load(from + y * tiles.step[0] + x * tiles.step[1]);
          }
          Y::factors(inputs, 1, &columns[0][x], kWide);
        }
        for (int y = 0; y < kTall; ++y) {
          Float row[kWide];
          X::factors(columns[y], 1, row, 1);
          for (int x = 0; x < kWide; ++x) {
            Vector::store(to + (y * kWide + x) * product + c, row[x]);
          }
        }
      }
      to += pass.in;
    }
  }
}

// Transforms sums[product][tile][kV vectors] to outputs, which it passes to finish.
template <class Y, class X, int kV>
void transform_sums(const ConvPass& pass, const TileBlock& block, int first, const float* sums,
                    const Finish& finish) {
  constexpr int kTall = Y::kInputs, kWide = X::kInputs, kWidth = kV * kLanes;
  constexpr int kDown = Y::kOutputs, kAlong = X::kOutputs, kMost = 12 * kDown * kAlong;
  const int64_t product = pass.tiles.block * kWidth;
  alignas(64) float values[kMost * kWidth];
  int64_t to[kMost];
  int count = 0;
  for (int k = 0; k < block.count; ++k) {
    Float outputs[kV][kDown * kAlong];
    for (int v = 0; v < kV; ++v) {
      const float* from = sums + k * kWidth + v * kLanes;
      Float columns[kDown][kWide];
      for (int x = 0; x < kWide; ++x) {
        Float column[kTall];
        for (int y = 0; y < kTall; ++y) column[y] = Vector::load(from + (y * kWide + x) * product);
        Y::outputs(column, 1, &columns[0][x], kWide);
      }
      for (int y = 0; y < kDown; ++y) X::outputs(columns[y], 1, &outputs[v][y * kAlong], 1);
    }
    for (int o = 0; o < kDown * kAlong; ++o) {
      const int64_t place = block.to[k * kDown * kAlong + o];
      if (place < 0) continue;
      for (int v = 0; v < kV; ++v) {
        Vector::store(values + count * kWidth + v * kLanes, outputs[v][o]);
      }
      to[count++] = place + first;
    }
    if (count > kMost - kDown * kAlong || k == block.count - 1) {
      finish({to, values, count, kV, first});
      count = 0;
    }
  }
}

// Sums of fewer products than kBlock allows, since the transform back subtracts them.
constexpr int64_t kSteps = 256;

// sums[product][tile][kV vectors of output channels] of all tiles of a block.
template <int kV>
void multiply_tiles(const ConvPass& pass, int count, const float* factors, const float* weights,
                    int64_t weights_of_product, float* sums) {
  constexpr int kWidth = kV * kLanes, kPixels = kTilePixels<kV>, kThird = kPixels / 3;
  const int32_t tap = 0;
  const int whole = (count + kThird - 1) / kThird * kThird;
  const WinogradTiles& tiles = pass.tiles;
  for (int p = 0; p < tiles.products(); ++p) {
    const float* from[WinogradTiles::kMost];
    for (int k = 0; k < whole; ++k) {
      from[k] = factors + (p * tiles.block + std::min(k, count - 1)) * tiles.row;
    }
    for (int64_t step = 0; step < pass.steps; step += kSteps) {
      const auto tile = [&](auto kSize, int k) {
        multiply<Float32, kV, kSize>(from + k, &tap, 1, step, std::min(kSteps, pass.steps - step),
                                     weights + p * weights_of_product + step * kWidth, step > 0,
                                     sums + (p * tiles.block + k) * kWidth);
      };
      int k = 0;
      for (; k + kPixels <= whole; k += kPixels) tile(std::integral_constant<int, kPixels>{}, k);
      if (whole - k == 2 * kThird) tile(std::integral_constant<int, 2 * kThird>{}, k);
      if (whole - k == kThird) tile(std::integral_constant<int, kThird>{}, k);
    }
  }
}

template <class Y, class X>
void run_tiles(const ConvPass& pass, const Ends<Float32>& ends, int64_t chains, const float* packed,
               const Finish& finish, float* scratch) {
  const WinogradTiles& tiles = pass.tiles;
  constexpr int kOutputs = Y::kOutputs * X::kOutputs;
  float* factors = scratch;
  float* sums = factors + tiles.products() * tiles.block * tiles.row;
  TileBlock block;
  const int64_t per_chain = tiles.from.size(), total = chains * per_chain;
  int64_t chain = 0, tile = 0;
  for (int64_t done = 0; done < total; done += tiles.block) {
    block.count = static_cast<int>(std::min(tiles.block, total - done));
    for (int k = 0; k < block.count; ++k) {
      block.from[k] = ends.in + chain * ends.in_chain + tiles.from[tile];
      for (int o = 0; o < kOutputs; ++o) {
        const int32_t to = tiles.to[tile * kOutputs + o];
        block.to[k * kOutputs + o] = to < 0 ? -1 : chain * ends.out_chain + to;
      }
      if (++tile == per_chain) tile = 0, ++chain;
    }
    transform_inputs<Y, X>(pass, block, factors);
    const float* weights = packed + pass.weights;
    for (int first = 0; first < pass.out;) {
      const auto channels = [&](auto kV) {
        const int64_t of_product = pass.steps * kV * kLanes;
        multiply_tiles<kV>(pass, block.count, factors, weights, of_product, sums);
        transform_sums<Y, X, kV>(pass, block, first, sums, finish);
        weights += tiles.products() * of_product, first += kV * kLanes;
      };
      if (pass.out - first > kLanes) {
        channels(std::integral_constant<int, kVectors>{});
      } else {
        channels(std::integral_constant<int, 1>{});
      }
    }
  }
}

// Returns what passes read in place of a buffer's values of some chains.
template <class N>
Ends<N> prepare(const Ends<N>& ends, const ConvBuffer&, int64_t, int64_t, int64_t, float*) {
  return ends;
}

// A pass in the form that was planned for it.
template <class N>
void run(const ConvPass& pass, const Ends<N>& ends, int64_t chains, const float* packed,
         const Finish& finish, float* scratch) {
  if constexpr (std::is_same_v<N, Float32>) {
    const WinogradTiles& tiles = pass.tiles;
    if (tiles.used()) {
      const auto with_axis = [&](int axis, const auto& f) {
        if (tiles.taps[axis] == 1) return f(Axis<1>{});
        if (tiles.taps[axis] == 2) return f(Axis<2>{});
        f(Axis<3>{});
      };
      return with_axis(0, [&](auto y) {
        with_axis(1, [&](auto x) {
          run_tiles<decltype(y), decltype(x)>(pass, ends, chains, packed, finish, scratch);
        });
      });
    }
  }
  run_pass<N>(pass, ends, chains, packed, finish);
}

}  // namespace
}  // namespace FASTLANGEVIN_ISA
}  // namespace fastlangevin
