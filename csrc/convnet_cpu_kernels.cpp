// A conv net's score with one instruction set, FASTLANGEVIN_ISA: this file is compiled once for each.
//
// A thread takes its chains a chunk at a time through the whole net and back, so that what a layer
// writes is still in its cache when the next one reads it, and no thread waits for another.
#include <algorithm>

#include "activations_cpu.h"
#include "convnet_cpu.h"
#include "operands_cpu.h"

namespace fastlangevin {
namespace FASTLANGEVIN_ISA {
namespace {

using Float = Vector::Float;

// A tile of pixels x kV vectors of output channels is summed in registers: as many sums as these
// hold beside the operands, and enough to hide the latency of the multiply-adds.
constexpr int kVectors = 2;
#if defined(__AVX512F__)
constexpr int kSums = 24;
#elif defined(__AVX2__)
constexpr int kSums = 12;
#else
constexpr int kSums = 8;
#endif

// Weights are used kBlock words at a time by kTiles tiles, so that they are read from the
// first-level cache by all but the first, and so are the sums in between.
constexpr int kTiles = 16, kBlock = 2048;

// sums (+)= a tile's products over some taps and some steps of N::kStep input channels each; w as
// packed by pack_weights.
template <class N, int kV>
__attribute__((noinline)) void multiply(const typename N::Type* const* from, const int32_t* taps,
                                        int64_t tap_count, int64_t steps, const float* w, bool add,
                                        float* sums) {
  constexpr int kPixels = kSums / kV;
  Float acc[kPixels][kV];
  for (int p = 0; p < kPixels; ++p) {
    for (int v = 0; v < kV; ++v) acc[p][v] = Float{};
  }
  for (int64_t t = 0; t < tap_count; ++t) {
    const typename N::Type* at[kPixels];
    for (int p = 0; p < kPixels; ++p) at[p] = from[p] + taps[t];
#pragma GCC unroll 2
    for (int64_t c = 0; c < steps; ++c, w += kV * kLanes) {
      typename N::Column column[kV];
      for (int v = 0; v < kV; ++v) column[v] = N::column(w + v * kLanes);
      for (int p = 0; p < kPixels; ++p) {
        const auto value = N::broadcast(at[p] + c * N::kStep);
        for (int v = 0; v < kV; ++v) N::multiply_add(value, column[v], acc[p][v]);
      }
    }
  }
  // Blocks are summed by themselves and then together, which keeps the rounding of long sums small.
  for (int p = 0; p < kPixels; ++p) {
    for (int v = 0; v < kV; ++v, sums += kLanes) {
      Vector::store(sums, add ? Vector::load(sums) + acc[p][v] : acc[p][v]);
    }
  }
}

// Where a pass reads and writes: the values of one buffer and another, for the chains of a chunk.
template <class N>
struct Ends {
  const typename N::Type* in;
  int64_t in_chain;
  typename N::Type* out;
  int64_t out_chain;
};

// All pixels of one block of kV vectors of output channels, from channel `first` on.
// finish(to, channel, sum) takes one vector.
template <class N, int kV, class Finish>
void run_block(const ConvPass& pass, const Ends<N>& ends, int64_t chains, const float* weights,
               int first, const Finish& finish) {
  constexpr int kWidth = kV * kLanes, kPixels = kSums / kV, kGroup = kTiles * kPixels;
  const int64_t pixels = pass.from.size(), total = chains * pixels, taps = pass.taps.size();
  const int64_t steps = (pass.in + N::kStep - 1) / N::kStep;
  const int64_t tap_block = std::max<int64_t>(1, kBlock / (kWidth * steps));
  const int64_t step_block = tap_block > 1 ? steps : std::max(1, kBlock / kWidth);
  const typename N::Type* from[kGroup];
  typename N::Type* to[kGroup];
  alignas(64) float sums[kGroup * kWidth];
  int64_t chain = 0, pixel = 0;
  for (int64_t done = 0; done < total; done += kGroup) {
    const int count = static_cast<int>(std::min<int64_t>(kGroup, total - done));
    for (int k = 0; k < count; ++k) {
      from[k] = ends.in + chain * ends.in_chain + pass.from[pixel];
      to[k] = ends.out + chain * ends.out_chain + pass.to[pixel] + first;
      if (++pixel == pixels) pixel = 0, ++chain;
    }
    const int whole = (count + kPixels - 1) / kPixels * kPixels;
    for (int k = count; k < whole; ++k) from[k] = from[count - 1];
    if (taps == 0) std::fill_n(sums, whole * kWidth, 0.0f);
    for (int64_t tap = 0; tap < taps; tap += tap_block) {
      for (int64_t step = 0; step < steps; step += step_block) {
        const typename N::Type* shifted[kPixels];
        for (int k = 0; k < whole; k += kPixels) {
          for (int p = 0; p < kPixels; ++p) shifted[p] = from[k + p] + step * N::kStep;
          multiply<N, kV>(shifted, pass.taps.data() + tap, std::min(tap_block, taps - tap),
                          std::min(step_block, steps - step),
                          weights + (tap * steps + step) * kWidth, tap + step > 0,
                          sums + k * kWidth);
        }
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
  const int64_t row = pass.taps.size() * ((pass.in + N::kStep - 1) / N::kStep);
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

// One chunk of chains, on its way through the net.
template <class N>
struct Chunk {
  using Type = typename N::Type;

  const ConvNet& net;
  const ConvBatch& batch;
  Type* workspace;
  int64_t chains;

  Type* values(size_t k) const { return workspace + net.buffers[k].values * batch.chunk; }
  // From a value to its slope, for smooth activations.
  int64_t slopes(size_t k) const {
    return (net.buffers[k].slopes - net.buffers[k].values) * batch.chunk;
  }
  Ends<N> ends(size_t in, size_t out) const {
    return {values(in), net.buffers[in].chain, values(out), net.buffers[out].chain};
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
      // Steps of two channels read one more than there is, and what is there may be a NaN by now.
      for (int c = buffer.channels; c % N::kStep != 0; ++c) to[at + c] = Type{};
    });
  }

  void forward(size_t k) const {
    const ConvLayer& layer = net.layers[k];
    const float* bias = batch.packed + net.biases[k];
    with_activation(layer, [&](const auto& activation) {
      const int64_t slopes = activation.kSmooth ? this->slopes(k + 1) : 0;
      run_pass<N>(net.forward[k], ends(k, k + 1), chains, batch.packed,
                  [&](Type* to, int channel, Float sum) {
                    Float slope;
                    const Float z = sum + Vector::load(bias + channel);
                    N::store(to, activation(z, slope));
                    if constexpr (activation.kSmooth) N::store(to + slopes, slope);
                  });
    });
  }

  void energies(int64_t first) const {
    const size_t top = net.layers.size();
    const ConvBuffer& buffer = net.buffers[top];
    const Type* features = values(top);
    for (int64_t n = 0; n < chains; ++n) {
      double total = batch.offset;  // of many terms that may cancel
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

  // The head's gradient becomes that before the last activation, in place of the latter's values.
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

  // The gradient after layer k's convolution becomes that before it and, in place of the values
  // that its slopes come from, before the activation below.
  void backward(size_t k) const {
    with_slope<N>(net.layers[k - 1], slopes(k), [&](const auto& times_slope) {
      for (const ConvPass& pass : net.backward[k]) {
        run_pass<N>(pass, ends(k + 1, k), chains, batch.packed,
                    [&](Type* to, int, Float sum) { N::store(to, times_slope(sum, to)); });
      }
    });
  }

  // The first layer's: in float32, to where the caller wants it.
  void write(int64_t first) const {
    const int64_t* s = batch.grad_strides;
    const ConvBuffer& buffer = net.buffers[0];
    const Type* base = values(0);
    for (const ConvPass& pass : net.backward[0]) {
      run_pass<N>(pass, ends(1, 0), chains, batch.packed,
                  [&](Type* to, int channel, Float sum) {
                    const int64_t at = to - channel - base, chain = at / buffer.chain;
                    const int64_t y = at % buffer.chain / buffer.row - buffer.top;
                    const int64_t x = at % buffer.row / buffer.pixel - buffer.left;
                    float* grad = batch.grad + (first + chain) * s[0] + y * s[2] + x * s[3];
                    const int count = std::min(kLanes, buffer.channels - channel);
                    for (int c = 0; c < count; ++c) grad[(channel + c) * s[1]] = sum[c];
                  });
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
