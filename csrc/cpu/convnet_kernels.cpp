// Input gradients of conv nets with one instruction set, FASTLANGEVIN_ISA. This file is compiled
// once for each.
//
// A thread takes its chains, a chunk at a time, forward and backward through the whole net. The
// output of a layer is then still in its cache when the next layer reads it, and no thread waits
// for another.
#include <algorithm>
#include <type_traits>

#include "cpu/activations.h"
#include "cpu/convnet.h"
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

// Computes all pixels of one block of kV vectors of output channels, from channel `first` on.
// finish(to, channel, sum) receives each vector and its target.
template <class N, int kV, class Finish>
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
    for (int k = 0; k < count; ++k) {
      for (int v = 0; v < kV; ++v) {
        finish(to[k] + v * kLanes, first + v * kLanes, Vector::load(sums + k * kWidth + v * kLanes));
      }
    }
  }
}

template <class N, class Finish>
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

// The passes of one chunk of chains through the net.
template <class N>
struct Chunk {
  using Type = typename N::Type;

  const ConvNet& net;
  const ConvBatch& batch;
  Type* workspace;
  int64_t chains;

  Type* values(size_t k) const { return workspace + net.buffers[k].values * batch.chunk; }
  // The distance from a value to its slope, for smooth activations.
  int64_t slopes(size_t k) const {
    return (net.buffers[k].slopes - net.buffers[k].values) * batch.chunk;
  }
  Ends<N> ends(size_t in, size_t out) const {
    return {values(in), net.buffers[in].chain, net.buffers[out].chain};
  }

  template <class Each>
  void each_pixel(const ConvBuffer& buffer, const Each& each) const {
    for (int64_t n = 0; n < chains; ++n) {
      for (int64_t y = 0; y < buffer.height; ++y) {
        for (int64_t x = 0; x < buffer.width; ++x) {
          each(n, y, x, n * buffer.chain + buffer.at(y, x));
        }
      }
    }
  }

  void read(int64_t first) const {
    const int64_t* s = batch.x_strides;
    const ConvBuffer& buffer = net.buffers[0];
    Type* to = values(0);
    each_pixel(buffer, [&](int64_t n, int64_t y, int64_t x, int64_t at) {
      const float* from = batch.x + (first + n) * s[0] + y * s[2] + x * s[3];
      for (int c = 0; c < buffer.channels; ++c) to[at + c] = N::narrow(from[c * s[1]]);
      // Steps of two channels read one channel too many, where a NaN may have been left.
      for (int c = buffer.channels; c % N::kStep != 0; ++c) to[at + c] = Type{};
    });
  }

  void forward(size_t k) const {
    const ConvLayer& layer = net.layers[k];
    const float* bias = batch.packed + net.biases[k];
    with_activation(layer, [&](const auto& activation) {
      const int64_t slopes = activation.kSmooth ? this->slopes(k + 1) : 0;
      Type* values = this->values(k + 1);
      run_pass<N>(net.forward[k], ends(k, k + 1), chains, batch.packed,
                  [&](int64_t to, int channel, Float sum) {
                    Float slope;
                    const Float z = sum + Vector::load(bias + channel);
                    N::store(values + to, activation(z, slope));
                    if constexpr (activation.kSmooth) N::store(values + to + slopes, slope);
                  });
    });
  }

  void energies(int64_t first) const {
    const size_t top = net.layers.size();
    const ConvBuffer& buffer = net.buffers[top];
    const Type* features = values(top);
    for (int64_t n = 0; n < chains; ++n) {
      double total = batch.offset;  // a sum of many terms that may cancel
      const float* head = batch.head;
      for (int64_t y = 0; y < buffer.height; ++y) {
        for (int64_t x = 0; x < buffer.width; ++x, head += buffer.pixel) {
          const Type* from = features + n * buffer.chain + buffer.at(y, x);
          for (int c = 0; c < buffer.channels; ++c) total += double{N::widen(from[c])} * head[c];
        }
      }
      batch.energies[first + n] = static_cast<float>(total);
    }
  }

  // Replaces the values of the last activation by the gradient before it, from that of the head.
  void turn() const {
    const size_t top = net.layers.size();
    const ConvBuffer& buffer = net.buffers[top];
    Type* to = values(top);
    with_slope<N>(net.layers[top - 1], slopes(top), [&](const auto& times_slope) {
      each_pixel(buffer, [&](int64_t, int64_t y, int64_t x, int64_t at) {
        const float* head = batch.head + (y * buffer.width + x) * buffer.pixel;
        for (int c = 0; c < buffer.pixel; c += kLanes) {
          N::store(to + at + c, times_slope(Vector::load(head + c), to + at + c));
        }
      });
    });
  }

  // Takes the gradient after layer k's convolution to the gradient before the activation below it,
  // which replaces the values that determine this activation's slopes.
  void backward(size_t k) const {
    with_slope<N>(net.layers[k - 1], slopes(k), [&](const auto& times_slope) {
      Type* values = this->values(k);
      for (const ConvPass& pass : net.backward[k]) {
        run_pass<N>(pass, ends(k + 1, k), chains, batch.packed, [&](int64_t to, int, Float sum) {
          N::store(values + to, times_slope(sum, values + to));
        });
      }
    });
  }

  // Writes the gradient before the first layer, in float32, to the caller's memory.
  void write(int64_t first) const {
    if (net.spread.pixel > 0) {
      for (int64_t n = 0; n < chains; ++n) collect(first, n);
      return;
    }
    for (const ConvPass& pass : net.backward[0]) {
      run_pass<N>(pass, ends(1, 0), chains, batch.packed,
                  [&](int64_t to, int channel, Float sum) {
                    float* grad = grad_at(first, to - channel);
                    const int count = std::min<int>(kLanes, net.buffers[0].channels - channel);
                    for (int c = 0; c < count; ++c) {
                      grad[(channel + c) * batch.grad_strides[1]] = sum[c];
                    }
                  });
    }
  }

  float* grad_at(int64_t first, int64_t at) const {
    const int64_t* s = batch.grad_strides;
    const ConvBuffer& buffer = net.buffers[0];
    const int64_t chain = at / buffer.chain, in_chain = at % buffer.chain;
    const int64_t y = in_chain / buffer.row - buffer.top;
    const int64_t x = in_chain % buffer.row / buffer.pixel - buffer.left;
    return batch.grad + (first + chain) * s[0] + y * s[2] + x * s[3];
  }

  // Writes the gradient of one chain if it is spread.
  void collect(int64_t first, int64_t n) const {
    using Four = Register<4>;
    const ConvBuffer& buffer = net.buffers[0];
    float* products = reinterpret_cast<float*>(reinterpret_cast<char*>(workspace) +
                                                net.workspace * batch.chunk);
    const Ends<N> ends{values(1) + n * net.buffers[1].chain, 0, 0};
    run_pass<N>(net.spread.products, ends, 1, batch.packed,
                [&](int64_t to, int, Float sum) { Vector::store(products + to, sum); });
    for (const ConvPass& pass : net.backward[0]) {
      for (size_t k = 0; k < pass.to.size(); ++k) {
        const float* from = products + pass.from[k];
        float* grad = grad_at(first, n * buffer.chain + pass.to[k]);
        for (int c = 0; c < buffer.channels; c += 4) {
          Four::Float sum = Four::Float{};
          for (const int32_t tap : pass.taps) sum += Four::load(from + tap + c);
          const int count = std::min(4, buffer.channels - c);
          for (int i = 0; i < count; ++i) grad[(c + i) * batch.grad_strides[1]] = sum[i];
        }
      }
    }
  }
};

template <class N>
void score(const ConvNet& net, const ConvBatch& batch, int64_t first, int64_t last,
           void* workspace) {
  const size_t top = net.layers.size();
  for (; first < last; first += batch.chunk) {
    const Chunk<N> chunk{net, batch, static_cast<typename N::Type*>(workspace),
                         std::min(last - first, batch.chunk)};
    chunk.read(first);
    for (size_t k = 0; k < top; ++k) chunk.forward(k);
    if (batch.energies != nullptr) chunk.energies(first);
    chunk.turn();
    for (size_t k = top; --k > 0;) chunk.backward(k);
    chunk.write(first);
  }
}

}  // namespace
}  // namespace FASTLANGEVIN_ISA

namespace cpu {
const ConvKernels FASTLANGEVIN_CONV_KERNELS = {
    FASTLANGEVIN_ISA::kLanes, FASTLANGEVIN_ISA::kVectors,
    FASTLANGEVIN_ISA::score<FASTLANGEVIN_ISA::Float32>,
    FASTLANGEVIN_ISA::score<FASTLANGEVIN_ISA::BFloat16>};
}  // namespace cpu
}  // namespace fastlangevin
