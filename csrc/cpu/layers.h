// The layers of a chunk of chains that are no matrix products, forward and backward.
#pragma once

#include <cmath>
#include <utility>
#include <vector>

#include "cpu/activations.h"
#include "cpu/products.h"

namespace fastlangevin {
namespace FASTLANGEVIN_ISA {
namespace {

// One chunk of chains, or a part of one. A layer computes its results, before its bias and
// activation, or its part in the gradient of a value that it reads, and passes them to `finish`.
template <class N>
struct ChunkLayers {
  using Type = typename N::Type;

  const ConvNet& net;
  const ConvBatch& batch;
  Type* workspace;
  int64_t chains;
  int64_t begin = 0;  // the first chain, if these are a part of a chunk

  Type* at(int64_t place) const { return workspace + place * batch.chunk; }
  Type* values(int v) const { return at(net.buffers[v].values) + shift(net.buffers[v]); }
  Type* grads(int v) const { return at(net.buffers[v].grads) + shift(net.buffers[v]); }
  Type* slopes(int v) const { return at(net.buffers[v].slopes) + kept_shift(net.buffers[v]); }
  // Null if the signs are those of the values.
  uint8_t* signs(int v) const {
    const ConvBuffer& buffer = net.buffers[v];
    if (buffer.signs < 0) return nullptr;
    return reinterpret_cast<uint8_t*>(at(buffer.signs)) + kept_shift(buffer) / 8;
  }

  // Where the chains of this part begin in a buffer, and in what is kept of it.
  int64_t shift(const ConvBuffer& buffer) const {
    return buffer.of_part ? 0 : begin * buffer.chain;
  }
  int64_t kept_shift(const ConvBuffer& buffer) const { return begin / net.part * buffer.part; }

  template <class Each>
  void each_pixel(const ConvBuffer& buffer, const Each& each) const {
    for (int64_t n = 0; n < chains; ++n) {
      for (int64_t y = 0; y < buffer.height; ++y) {
        for (int64_t x = 0; x < buffer.width; ++x) each(n, y, x);
      }
    }
  }

  // Calls finish for all channels of a pixel that is written at `to`; vector(channel) is a result.
  template <class Result>
  static void finish_pixel(int64_t to, int channels, const Finish& finish, const Result& vector) {
    constexpr int kMost = 64;
    alignas(64) float values[kMost * kLanes];
    for (int first = 0; first < channels; first += kMost * kLanes) {
      const int count = std::min((channels - first + kLanes - 1) / kLanes, kMost);
      for (int v = 0; v < count; ++v) {
        Vector::store(values + v * kLanes, vector(first + v * kLanes));
      }
      const int64_t target = to + first;
      finish({&target, values, 1, count, first});
    }
  }

  // Results are f(channel, a, b) of two values of the same pixel and channel; a b of one pixel
  // belongs to all pixels.
  template <class F>
  void pairs(const Type* a, const ConvBuffer& a_at, const Type* b, const ConvBuffer& b_at,
             const ConvBuffer& out, const Finish& finish, const F& f) const {
    const bool single = b_at.height == 1 && b_at.width == 1;
    each_pixel(out, [&](int64_t n, int64_t y, int64_t x) {
      const Type* one = a + n * a_at.chain + a_at.at(y, x);
      const Type* two = b + n * b_at.chain + (single ? b_at.at(0, 0) : b_at.at(y, x));
      finish_pixel(n * out.chain + out.at(y, x), out.channels, finish,
                   [&](int c) { return f(c, N::load(one + c), N::load(two + c)); });
    });
  }

  void mix(const MixPass& pass, const Type* from, const ConvBuffer& in, const ConvBuffer& out,
           const Finish& finish) const {
    for (int64_t n = 0; n < chains; ++n) {
      for (size_t p = 0; p < pass.to.size(); ++p) {
        finish_pixel(n * out.chain + pass.to[p], out.channels, finish, [&](int c) {
          Float sum = Float{};
          for (int32_t k = pass.begin[p]; k < pass.begin[p + 1]; ++k) {
            sum += N::load(from + n * in.chain + pass.from[k] + c) * pass.factors[k];
          }
          return sum;
        });
      }
    }
  }

  // The maximum of each window, and the position where it was found first. A NaN is the maximum.
  void greatest(size_t k, const Finish& finish) const {
    const MixPass& pass = net.plans[k].mix;
    const int v = net.layers[k].inputs[0];
    const ConvBuffer &in = net.buffers[v], &out = net.buffers[k + 1];
    for (int64_t n = 0; n < chains; ++n) {
      const Type* from = values(v) + n * in.chain;
      for (size_t p = 0; p < pass.to.size(); ++p) {
        const int64_t to = n * out.chain + pass.to[p];
        finish_pixel(to, out.channels, finish, [&](int c) {
          Float best = Vector::broadcast(-INFINITY), choice = Float{};
          for (int32_t i = pass.begin[p]; i < pass.begin[p + 1]; ++i) {
            const Float value = N::load(from + pass.from[i] + c);
            const auto better = !(value <= best);
            best = better ? value : best;
            choice = better ? Vector::broadcast(pass.factors[i]) : choice;
          }
          N::store(at(out.choices) + to + c, choice);
          return best;
        });
      }
    }
  }

  void choose(size_t k, const Finish& finish) const {
    const MixPass& pass = net.plans[k].mix_back;
    const ConvBuffer &in = net.buffers[net.layers[k].inputs[0]], &out = net.buffers[k + 1];
    for (int64_t n = 0; n < chains; ++n) {
      const Type* grad = grads(k + 1) + n * out.chain;
      const Type* choices = at(out.choices) + n * out.chain;
      for (size_t p = 0; p < pass.to.size(); ++p) {
        finish_pixel(n * in.chain + pass.to[p], in.channels, finish, [&](int c) {
          Float sum = Float{};
          for (int32_t i = pass.begin[p]; i < pass.begin[p + 1]; ++i) {
            const auto chosen = N::load(choices + pass.from[i] + c) == pass.factors[i];
            sum += chosen ? N::load(grad + pass.from[i] + c) : Float{};
          }
          return sum;
        });
      }
    }
  }

  // The maximum m over a chain's value, and the sum of exp(value - m).
  std::pair<float, float> exponentials(const Type* from, const ConvBuffer& buffer) const {
    float most = -INFINITY, sum = 0;
    const auto each = [&](const auto& vector) {
      for (int64_t y = 0; y < buffer.height; ++y) {
        for (int64_t x = 0; x < buffer.width; ++x) {
          for (int c = 0; c < buffer.channels; c += kLanes) {
            vector(N::load(from + buffer.at(y, x) + c), std::min(kLanes, buffer.channels - c));
          }
        }
      }
    };
    each([&](Float value, int count) {
      for (int i = 0; i < count; ++i) most = value[i] > most ? value[i] : most;
    });
    each([&](Float value, int count) {
      const Float e = exponential(value - most);
      for (int i = 0; i < count; ++i) sum += e[i];
    });
    return {most, sum};
  }

  void log_sum_exp(size_t k, const Finish& finish) const {
    const int v = net.layers[k].inputs[0];
    const ConvBuffer &in = net.buffers[v], &out = net.buffers[k + 1];
    for (int64_t n = 0; n < chains; ++n) {
      const auto [most, sum] = exponentials(values(v) + n * in.chain, in);
      // An infinite maximum is the result, and a NaN is in the sum.
      const float result = std::isinf(most) && sum == sum ? most : most + std::log(sum);
      finish_pixel(n * out.chain + out.at(0, 0), 1, finish,
                   [&](int) { return Vector::broadcast(result); });
    }
  }

  void softmax(size_t k, const Finish& finish) const {
    const int v = net.layers[k].inputs[0];
    const ConvBuffer &in = net.buffers[v], &out = net.buffers[k + 1];
    for (int64_t n = 0; n < chains; ++n) {
      const Type* from = values(v) + n * in.chain;
      const auto [most, sum] = exponentials(from, in);
      const float factor = N::widen(grads(k + 1)[n * out.chain + out.at(0, 0)]) / sum;
      for (int64_t y = 0; y < in.height; ++y) {
        for (int64_t x = 0; x < in.width; ++x) {
          const int64_t pixel = in.at(y, x);
          finish_pixel(n * in.chain + pixel, in.channels, finish, [&, most = most](int c) {
            return exponential(N::load(from + pixel + c) - most) * factor;
          });
        }
      }
    }
  }

  // The sum of `count` values, in partial sums that keep the rounding error small.
  static double total(const float* values, int count) {
    Float parts[4];
    for (Float& part : parts) part = Float{};
    int c = 0;
    for (; c + 4 * kLanes <= count; c += 4 * kLanes) {
      for (int k = 0; k < 4; ++k) parts[k] += Vector::load(values + c + k * kLanes);
    }
    for (; c + kLanes <= count; c += kLanes) parts[0] += Vector::load(values + c);
    const Float part = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    double sums[2] = {};  // two chains of dependent additions
    for (int i = 0; i < kLanes; ++i) sums[i % 2] += part[i];
    for (; c < count; ++c) sums[0] += values[c];
    return sums[0] + sums[1];
  }

  // Sets means[i][channel] to of(mean), for the mean of terms[i] over all pixels and the channel's
  // group, where f(y, x, channel, terms) computes the terms of a vector of channels.
  template <int kTerms, class F, class Of>
  void group_means(size_t k, float* const (&means)[kTerms], const F& f, const Of& of) const {
    const ConvLayer& layer = net.layers[k];
    const ConvBuffer& buffer = net.buffers[k + 1];
    const auto sum = [&](auto kSize, int first) {
      Float sums[kTerms][kSize];
      for (int y = 0; y < buffer.height; ++y) {
        // Rows are summed separately, which keeps the rounding error small. Loops set them to zero,
        // since an empty initialiser becomes a string instruction, which starts slowly.
        Float rows[kTerms][kSize];
        for (auto& row : rows) {
          for (Float& value : row) value = Float{};
        }
        for (int x = 0; x < buffer.width; ++x) {
          for (int v = 0; v < kSize; ++v) {
            Float terms[kTerms];
            f(y, x, first + v * kLanes, terms);
            for (int i = 0; i < kTerms; ++i) rows[i][v] += terms[i];
          }
        }
        for (int i = 0; i < kTerms; ++i) {
          for (int v = 0; v < kSize; ++v) {
            sums[i][v] = y > 0 ? sums[i][v] + rows[i][v] : rows[i][v];
          }
        }
      }
      for (int i = 0; i < kTerms; ++i) {
        for (int v = 0; v < kSize; ++v) Vector::store(means[i] + first + v * kLanes, sums[i][v]);
      }
    };
    // Several vectors together are one read of whole cache lines.
    constexpr std::integral_constant<int, 4> kSeveral;
    constexpr std::integral_constant<int, 1> kOne;
    int c = 0;
    for (; c + kSeveral * kLanes <= layer.out; c += kSeveral * kLanes) sum(kSeveral, c);
    for (; c < layer.out; c += kLanes) sum(kOne, c);
    const int size = layer.out / layer.groups;
    const double count = double(size) * buffer.height * buffer.width;
    for (float* at : means) {
      for (int first = 0; first < layer.out; first += size) {
        std::fill_n(at + first, size, of(static_cast<float>(total(at + first, size) / count)));
      }
    }
  }

  // A chain's value minus the mean of its group, and over its deviation. The backward pass reads
  // the statistics that the forward pass has stored.
  struct Normal {
    const ConvBuffer& in;
    const Type* from;
    float *means, *scales;  // for every channel; a scale is 1 over the deviation

    Float value(int y, int x, int c) const { return N::load(from + in.at(y, x) + c); }
    Float centred(int y, int x, int c) const { return value(y, x, c) - Vector::load(means + c); }
    Float operator()(int y, int x, int c) const {
      return centred(y, x, c) * Vector::load(scales + c);
    }
  };

  Normal normal(size_t k, int64_t n) const {
    const int v = net.layers[k].inputs[0];
    const int64_t padded = (net.layers[k].out + kLanes - 1) / kLanes * kLanes;
    float* statistics =
        reinterpret_cast<float*>(at(net.buffers[k + 1].statistics)) + n * 2 * padded;
    return {net.buffers[v], values(v) + n * net.buffers[v].chain, statistics, statistics + padded};
  }

  void normalise(size_t k, const Finish& finish) const {
    const ConvBuffer& out = net.buffers[k + 1];
    const float eps = net.layers[k].factors[0];
    const float* weights = batch.packed + net.plans[k].factors;
    for (int64_t n = 0; n < chains; ++n) {
      const Normal at = normal(k, n);
      group_means<1>(
          k, {at.means},
          [&](int y, int x, int c, Float(&terms)[1]) { terms[0] = at.value(y, x, c); },
          [](float mean) { return mean; });
      group_means<1>(
          k, {at.scales},
          [&](int y, int x, int c, Float(&terms)[1]) {
            const Float difference = at.centred(y, x, c);
            terms[0] = difference * difference;
          },
          [=](float variance) { return 1.0f / std::sqrt(variance + eps); });
      for (int y = 0; y < out.height; ++y) {
        for (int x = 0; x < out.width; ++x) {
          finish_pixel(n * out.chain + out.at(y, x), out.channels, finish, [&](int c) {
            return at.centred(y, x, c) * (Vector::load(at.scales + c) * Vector::load(weights + c));
          });
        }
      }
    }
  }

  void normalise_back(size_t k, const Finish& finish) const {
    const ConvBuffer &in = net.buffers[net.layers[k].inputs[0]], &out = net.buffers[k + 1];
    const float* weights = batch.packed + net.plans[k].factors;
    const int64_t padded = (out.channels + kLanes - 1) / kLanes * kLanes;
    std::vector<float> means(2 * padded);
    float *grads_mean = means.data(), *slopes = grads_mean + padded;
    for (int64_t n = 0; n < chains; ++n) {
      const Normal at = normal(k, n);
      const Type* from = grads(k + 1) + n * out.chain;
      const auto grad = [&](int y, int x, int c) {
        return N::load(from + out.at(y, x) + c) * Vector::load(weights + c);
      };
      group_means<2>(
          k, {grads_mean, slopes},
          [&](int y, int x, int c, Float(&terms)[2]) {
            terms[0] = grad(y, x, c);
            terms[1] = terms[0] * at(y, x, c);
          },
          [](float mean) { return mean; });
      for (int y = 0; y < in.height; ++y) {
        for (int x = 0; x < in.width; ++x) {
          finish_pixel(n * in.chain + in.at(y, x), in.channels, finish, [&](int c) {
            const Float rest = grad(y, x, c) - Vector::load(grads_mean + c) -
                               at(y, x, c) * Vector::load(slopes + c);
            return rest * Vector::load(at.scales + c);
          });
        }
      }
    }
  }
};

}  // namespace
}  // namespace FASTLANGEVIN_ISA
}  // namespace fastlangevin
