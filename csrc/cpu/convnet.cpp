// Packs the weights of a network and distributes its chains over threads.
#include "cpu/convnet.h"

#include <algorithm>
#include <cstring>

#include "common/step.h"
#include "cpu/pass_plan.h"
#include "cpu/winograd_plan.h"

namespace fastlangevin {
namespace cpu {
namespace {

// Where a pass by tiles has a word: those of a part are together, in each plane.
int64_t word_at(const ConvPass& pass, int64_t word, int64_t plane) {
  const MatrixTiles& matrix = pass.matrix;
  const int64_t parts = (matrix.words + matrix.again) / pass.steps;
  const int64_t in_tap = word % matrix.words, part = std::min(in_tap / pass.steps, parts - 1);
  const int64_t begin = std::min(part * pass.steps, matrix.words - pass.steps);
  const int64_t in_pass = (word / matrix.words * parts + part) * matrix.planes + plane;
  return in_pass * pass.steps + in_tap - begin;
}

// Packs the weights at(input channel, output channel)[position], or null beyond the last, as [block
// of output channels][kernel position][one or two input channels][output channel of the
// block][which of the two]. For tiles, see word_at; words of the last part that the part before it
// has as well are zero.
template <class At>
void pack_pass(const ConvKernels& kernels, bool pairs, const ConvPass& pass, int threads,
               const At& at, float* packed) {
  const int lanes = kernels.lanes, whole = lanes * kernels.vectors;
  const int64_t step = pairs ? 2 : 1, steps = (pass.in + step - 1) / step;
  const int64_t rows = pass.rows.size(), blocks = (pass.out + whole - 1) / whole;
  const int64_t planes = pass.matrix.planes, all = pass.tap_count() * pass.steps * planes;
  constexpr int64_t kFew = 4;
  packed += pass.weights;
  parallel_for(blocks, threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * whole, block = pass.out - begin > lanes ? whole : lanes;
      float* to = packed + begin * all;
      if (pass.matrix.again > 0) std::fill_n(to, all * block, 0.0f);
      // A few steps at a time, through memory that stays in the cache: the words of two kernel
      // positions are usually a power of two apart and would evict each other.
      std::vector<float> few(rows * planes * kFew * block);
      for (int64_t s = 0; s < steps; s += kFew) {
        const int64_t count = std::min(kFew, steps - s);
        for (int64_t o = 0; o < block; ++o) {
          for (int64_t k = 0; k < count; ++k) {
            const int64_t i = (s + k) * step;
            const float* one = at(i, begin + o);
            const float* two = step == 2 ? at(i + 1, begin + o) : nullptr;
            for (int64_t r = 0; r < rows; ++r) {
              float word = one ? one[pass.rows[r]] : 0.0f;
              if (step == 1) {
                few[(r * kFew + k) * block + o] = word;
                continue;
              }
              float rest[2] = {word, two ? two[pass.rows[r]] : 0.0f};
              for (int64_t plane = 0; plane < planes; ++plane) {
                const uint16_t pair[2] = {to_bfloat16(rest[0]), to_bfloat16(rest[1])};
                for (int j = 0; j < 2; ++j) rest[j] -= from_bfloat16(pair[j]);
                std::memcpy(&word, pair, sizeof pair);
                few[((plane * rows + r) * kFew + k) * block + o] = word;
              }
            }
          }
        }
        for (int64_t r = 0; r < planes * rows; ++r) {
          const float* from = few.data() + r * kFew * block;
          const int64_t word = r % rows * steps + s, plane = r / rows;
          if (pass.matrix.rows == 0) {
            std::copy_n(from, count * block, to + word * block);
            continue;
          }
          for (int64_t k = 0; k < count; ++k) {
            std::copy_n(from + k * block, block, to + word_at(pass, word + k, plane) * block);
          }
        }
      }
    }
  });
}

// Packs the transformed weights of a pass by tiles, as [block of output channels][product][phase]
// [input channel][output channel of the block].
template <class At>
void pack_tiles(const ConvKernels& kernels, const ConvPass& pass, int threads, const At& at,
                float* packed) {
  const int lanes = kernels.lanes, whole = lanes * kernels.vectors;
  const WinogradTiles& tiles = pass.tiles;
  const int64_t blocks = (pass.out + whole - 1) / whole, phases = tiles.phases.size();
  const int positions = tiles.taps[0] * tiles.taps[1], products = tiles.products();
  packed += pass.weights;
  parallel_for(blocks, threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * whole, block = pass.out - begin > lanes ? whole : lanes;
      float* to = packed + begin * products * pass.steps;
      PhaseTaps taps = {};
      PhaseProducts words;
      for (int64_t phase = 0; phase < phases; ++phase) {
        const int32_t* rows = tiles.rows.data() + phase * positions;
        for (int64_t i = 0; i < pass.in; ++i) {
          for (int64_t o = 0; o < block; ++o) {
            const float* one = at(i, begin + o);
            for (int k = 0; k < positions; ++k) taps[k][o] = one ? one[rows[k]] : 0.0f;
          }
          transform_weights(tiles, taps, words);
          for (int p = 0; p < products; ++p) {
            std::copy_n(words[p], block, to + (p * pass.steps + phase * pass.in + i) * block);
          }
        }
      }
    }
  });
}

template <class At>
void pack_any(const ConvKernels& kernels, bool pairs, const ConvPass& pass, int threads,
              const At& at, float* packed) {
  if (pass.tiles.used()) return pack_tiles(kernels, pass, threads, at, packed);
  pack_pass(kernels, pairs, pass, threads, at, packed);
}

// at(output channel, input channel) of weights [out, in, kh, kw], or null beyond the last.
auto weights_at(const ConvLayer& layer, const float* weights) {
  return [&layer, weights](int64_t o, int64_t i) -> const float* {
    if (o >= layer.out || i >= layer.in) return nullptr;
    return weights + (o * layer.in + i) * layer.kernel[0] * layer.kernel[1];
  };
}

void pack_conv(const ConvNet& net, size_t k, const float* weights, int threads, float* packed) {
  const ConvLayer& layer = net.layers[k];
  const LayerPlan& plan = net.plans[k];
  const int positions = layer.kernel[0] * layer.kernel[1];
  const auto at = weights_at(layer, weights);
  const auto pack = [&](const ConvPass& pass, const auto& from) {
    pack_any(*net.kernels, net.operands != Operands::kFloat32, pass, threads, from, packed);
  };
  pack(plan.forward.front(), [&](int64_t i, int64_t o) { return at(o, i); });
  if (k == 0 && net.spread.pixel > 0) {
    pack(net.spread.products, [&](int64_t o, int64_t i) -> const float* {
      const float* all = i < positions * layer.in ? at(o, i % layer.in) : nullptr;
      return all ? all + i / layer.in : nullptr;
    });
  } else if (plan.backward.front().quads) {
    const std::vector<float> quads = quad_weights(layer, weights);
    const int64_t taps = plan.backward.front().rows.size();
    pack(plan.backward.front(), [&](int64_t o, int64_t i) -> const float* {
      if (o >= layer.out || i >= 4 * layer.in) return nullptr;
      return quads.data() + (o * 4 * layer.in + i) * taps;
    });
  } else {
    for (const ConvPass& pass : plan.backward) pack(pass, at);
  }
}

void pack_transposed(const ConvNet& net, size_t k, const float* weights, int threads,
                     float* packed) {
  ConvLayer convolution = net.layers[k];
  std::swap(convolution.in, convolution.out);
  const auto at = weights_at(convolution, weights);
  const auto pack = [&](const ConvPass& pass, const auto& from) {
    pack_any(*net.kernels, net.operands != Operands::kFloat32, pass, threads, from, packed);
  };
  for (const ConvPass& pass : net.plans[k].forward) pack(pass, at);
  pack(net.plans[k].backward.front(), [&](int64_t i, int64_t o) { return at(o, i); });
}

}  // namespace

void pack_weights(const ConvNet& net, const std::vector<LayerWeights>& weights, float* packed,
                  int threads) {
  const int lanes = net.kernels->lanes;
  for (size_t k = 0; k < net.layers.size(); ++k) {
    const ConvLayer& layer = net.layers[k];
    const LayerPlan& plan = net.plans[k];
    // Padding: channels that do not exist are zero, so that they add nothing to what reads them.
    const auto fill = [&](int64_t begin, const float* from, float constant) {
      float* to = packed + begin;
      std::fill_n(to, (layer.out + lanes - 1) / lanes * lanes, 0.0f);
      if (from)
        std::copy_n(from, layer.out, to);
      else
        std::fill_n(to, layer.out, constant);
    };
    if (layer.kind == LayerKind::kConv) {
      pack_conv(net, k, weights[k].weights, threads, packed);
    } else if (layer.kind == LayerKind::kTransposed) {
      pack_transposed(net, k, weights[k].weights, threads, packed);
    } else if (layer.kind == LayerKind::kPointwise) {
      fill(plan.factors, weights[k].weights, layer.factors[0]);
    } else if (layer.kind == LayerKind::kNorm) {
      fill(plan.factors, weights[k].weights, 1.0f);
    }
    fill(plan.bias, weights[k].bias, 0.0f);
    std::copy_n(weights[k].settings.data(), 2, packed + plan.settings);
  }
}

void pack_convolution(const Convolution& conv, const float* weights, float* packed, int threads) {
  const auto at = weights_at(conv.layer, weights);
  for (const ConvPass& pass : conv.passes) {
    if (conv.gradient) {
      pack_any(*conv.kernels, false, pass, threads, at, packed);
    } else {
      pack_any(
          *conv.kernels, false, pass, threads, [&](int64_t i, int64_t o) { return at(o, i); },
          packed);
    }
  }
}

void convolve(const Convolution& conv, const ConvolutionBatch& batch, int64_t chains, int threads) {
  // Enough chains for whole tiles of small images, whose frames stay in the second-level cache.
  constexpr int64_t kMost = 8, kNumbers = 1 << 16;
  const int64_t chunk = std::clamp<int64_t>(kNumbers / conv.read.chain, 1, kMost);
  parallel_for(chains, threads, [&](int64_t first, int64_t last) {
    std::vector<float> memory(conv.read.chain * std::min(chunk, last - first) + conv.scratch);
    conv.kernels->convolve(conv, batch, first, last, chunk, memory.data());
  });
}

void convnet_score(const ConvNet& net, const ConvBatch& batch, void* workspace, int threads) {
  each_share(net, batch, workspace, threads, [&](int64_t, int64_t first, int64_t last, void* own) {
    score_kernel(net)(net, batch, first, last, own);
  });
}

}  // namespace cpu
}  // namespace fastlangevin
