// Matrix products over the pixels of a pass: convolutions, linear layers and their input gradients.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/convnet_plan.h"
#include "cpu/operands.h"

namespace fastlangevin {
namespace FASTLANGEVIN_ISA {
namespace {

using Float = Vector::Float;

// A tile of pixels x kV vectors of output channels is summed in registers. It has as many sums as
// fit there along with the operands, and enough to hide the latency of the multiply-adds.
constexpr int kVectors = 2;
#if defined(__AVX512F__)
constexpr int kSums = 24;
#else
constexpr int kSums = 12;
#endif

// A single vector of 512 bits is processed as two halves: every multiply-add then needs a number
// broadcast from memory, and broadcasts to registers of half the width are twice as fast.
template <int kV>
using Sum = Register<kLanes == 16 && kV == 1 ? 8 : kLanes>;
template <int kV>
constexpr int kSumsOfPixel = kV * kLanes * 4 / sizeof(typename Sum<kV>::Float);
template <int kV>
constexpr int kTilePixels = kSums / kSumsOfPixel<kV>;

// kTiles tiles use kBlock words of weights at a time.
constexpr int kTiles = 8, kBlock = 16384;

// Sets or adds to sums the products of a tile over some taps and some steps of N::kStep input
// channels each; w is packed by pack_weights.
template <class N, int kV, int kPixels>
__attribute__((noinline)) void multiply(const typename N::Type* const* from, const int32_t* taps,
                                        int64_t tap_count, int64_t first_step, int64_t steps,
                                        const float* w, bool add, float* sums) {
  using R = Sum<kV>;
  constexpr int kR = kSumsOfPixel<kV>, kWide = kV * kLanes / kR;
  typename R::Float acc[kPixels][kR];
  for (int p = 0; p < kPixels; ++p) {
    for (int r = 0; r < kR; ++r) acc[p][r] = typename R::Float{};
  }
  for (int64_t t = 0; t < tap_count; ++t) {
    const typename N::Type* at[kPixels];
    for (int p = 0; p < kPixels; ++p) at[p] = from[p] + taps[t] + first_step * N::kStep;
#pragma GCC unroll 2
    for (int64_t c = 0; c < steps; ++c, w += kV * kLanes) {
      decltype(N::template column<R>(w)) column[kR];
      for (int r = 0; r < kR; ++r) column[r] = N::template column<R>(w + r * kWide);
      for (int p = 0; p < kPixels; ++p) {
        const auto value = N::template broadcast<R>(at[p] + c * N::kStep);
        for (int r = 0; r < kR; ++r) N::template multiply_add<R>(value, column[r], acc[p][r]);
      }
    }
  }
  // Blocks are summed separately and then added, which keeps the rounding error of long sums small.
  for (int p = 0; p < kPixels; ++p) {
    for (int r = 0; r < kR; ++r, sums += kWide) {
      R::store(sums, add ? R::load(sums) + acc[p][r] : acc[p][r]);
    }
  }
}

// The source of a pass, and the strides between the chains of a chunk in its source and target.
template <class N>
struct Ends {
  const typename N::Type* in;
  int64_t in_chain, out_chain;
};

// Results of `count` pixels: for each, `vectors` vectors of channels, from `channel` on.
struct Results {
  const int64_t* to;
  const float* values;
  int count, vectors, channel;
};

// What is done with results: a reference to a function each(to, channel, result) of single vectors.
// One indirect call per group of results keeps the passes independent of what follows them.
class Finish {
 public:
  template <class Each>
  Finish(const Each& each)
      : each_(&each), run_([](const void* data, const Results& results) {
          const Each each = *static_cast<const Each*>(data);  // a copy that no store can change
          const auto run = [&](int vectors) {
            const float* value = results.values;
            for (int k = 0; k < results.count; ++k) {
              for (int v = 0; v < vectors; ++v, value += kLanes) {
                each(results.to[k] + v * kLanes, results.channel + v * kLanes, Vector::load(value));
              }
            }
          };
          if (results.vectors == kVectors) return run(kVectors);
          run(results.vectors);
        }) {}
  void operator()(const Results& results) const { run_(each_, results); }

 private:
  const void* each_;
  void (*run_)(const void*, const Results&);
};

// Computes all pixels of one block of kV vectors of output channels, from channel `first` on.
template <class N, int kV>
void run_block(const ConvPass& pass, const Ends<N>& ends, int64_t chains, const float* weights,
               int first, const Finish& finish) {
  constexpr int kWidth = kV * kLanes, kPixels = kTilePixels<kV>, kThird = kPixels / 3;
  constexpr int kGroup = kTiles * kPixels;
  const int64_t pixels = pass.from.size(), total = chains * pixels, taps = pass.taps.size();
  const int64_t tap_block = std::max<int64_t>(1, kBlock / (kWidth * pass.steps));
  const int64_t step_block = tap_block > 1 ? pass.steps : kBlock / kWidth;
  const typename N::Type* from[kGroup];
  int64_t to[kGroup];
  alignas(64) float sums[kGroup * kWidth];
  int64_t chain = 0, pixel = 0;
  for (int64_t done = 0; done < total; done += kGroup) {
    const int count = static_cast<int>(std::min<int64_t>(kGroup, total - done));
    for (int k = 0; k < count; ++k) {
      from[k] = ends.in + chain * ends.in_chain + pass.from[pixel];
      to[k] = chain * ends.out_chain + pass.to[pixel] + first;
      if (++pixel == pixels) pixel = 0, ++chain;
    }
    const int whole = (count + kThird - 1) / kThird * kThird;
    for (int k = count; k < whole; ++k) from[k] = from[count - 1];
    if (taps == 0) std::fill_n(sums, whole * kWidth, 0.0f);
    for (int64_t tap = 0; tap < taps; tap += tap_block) {
      for (int64_t step = 0; step < pass.steps; step += step_block) {
        const auto tile = [&](auto kSize, int k) {
          multiply<N, kV, kSize>(from + k, pass.taps.data() + tap, std::min(tap_block, taps - tap),
                                 step, std::min(step_block, pass.steps - step),
                                 weights + (tap * pass.steps + step) * kWidth, tap + step > 0,
                                 sums + k * kWidth);
        };
        int k = 0;
        for (; k + kPixels <= whole; k += kPixels) {
          tile(std::integral_constant<int, kPixels>{}, k);
        }
        if (whole - k == 2 * kThird) tile(std::integral_constant<int, 2 * kThird>{}, k);
        if (whole - k == kThird) tile(std::integral_constant<int, kThird>{}, k);
      }
    }
    finish({to, sums, count, kV, first});
  }
}

template <class N>
void run_pass(const ConvPass& pass, const Ends<N>& ends, int64_t chains, const float* packed,
              const Finish& finish) {
  const int64_t row = pass.taps.size() * pass.steps;
  const float* weights = packed + pass.weights;
  for (int first = 0; first < pass.out;) {
    const bool wide = pass.out - first > kLanes;
    const int width = wide ? kVectors * kLanes : kLanes;
    if (wide) {
      run_block<N, kVectors>(pass, ends, chains, weights, first, finish);
    } else {
      run_block<N, 1>(pass, ends, chains, weights, first, finish);
    }
    weights += row * width, first += width;
  }
}

}  // namespace
}  // namespace FASTLANGEVIN_ISA
}  // namespace fastlangevin
