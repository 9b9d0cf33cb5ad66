// Energies and input gradients of networks with one instruction set, FASTLANGEVIN_ISA. This file is
// compiled once for each.
//
// A thread takes its chains, a chunk at a time, forward and backward through the whole network. The
// output of a layer is then still in its cache when the next layer reads it, and no thread waits
// for another. No result depends on which chains share a chunk.
#include <cmath>
#include <vector>

#include "cpu/activations.h"
#include "cpu/convnet.h"
#include "cpu/products.h"

namespace fastlangevin {
namespace FASTLANGEVIN_ISA {
namespace {

// The passes of one chunk of chains through the network.
template <class N>
struct Chunk {
  using Type = typename N::Type;

  const ConvNet& net;
  const ConvBatch& batch;
  Type* workspace;
  int64_t chains;

  Type* at(int64_t place) const { return workspace + place * batch.chunk; }
  Type* values(int v) const { return at(net.buffers[v].values); }
  Type* grads(int v) const { return at(net.buffers[v].grads); }

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

  void read(int64_t first) const {
    const int64_t* s = batch.x_strides;
    const ConvBuffer& buffer = net.buffers[0];
    // Vectors read padded channels, and steps of two read one too many. A NaN may be left there.
    const int end = net.direct ? (buffer.channels + N::kStep - 1) / N::kStep * N::kStep
                               : static_cast<int>(buffer.pixel);
    each_pixel(buffer, [&](int64_t n, int64_t y, int64_t x) {
      const float* from = batch.x + (first + n) * s[0] + y * s[2] + x * s[3];
      Type* to = values(0) + n * buffer.chain + buffer.at(y, x);
      for (int c = 0; c < buffer.channels; ++c) to[c] = N::narrow(from[c * s[1]]);
      for (int c = buffer.channels; c < end; ++c) to[c] = Type{};
    });
  }

  void forward(size_t k) const {
    const ConvLayer& layer = net.layers[k];
    const LayerPlan& plan = net.plans[k];
    const ConvBuffer& out = net.buffers[k + 1];
    const float* bias = batch.packed + plan.bias;
    Type* values = this->values(k + 1);
    with_activation(layer.activation, batch.packed + plan.settings, [&](const auto& activation) {
      const int64_t slopes = activation.kSmooth ? at(out.slopes) - values : 0;
      const auto each = [=](int64_t to, int channel, Float result) {
        Float slope;
        const Float z = result + Vector::load(bias + channel);
        N::store(values + to, activation(z, slope));
        if constexpr (activation.kSmooth) N::store(values + to + slopes, slope);
      };
      compute(k, each);
    });
  }

  // Computes the results of layer k, before its bias and activation.
  void compute(size_t k, const Finish& finish) const {
    const ConvLayer& layer = net.layers[k];
    const LayerPlan& plan = net.plans[k];
    const ConvBuffer &in = net.buffers[layer.inputs[0]], &out = net.buffers[k + 1];
    const Type* from = values(layer.inputs[0]);
    switch (layer.kind) {
      case LayerKind::kConv:
        return run_pass<N>(plan.forward, Ends<N>{from, in.chain, out.chain}, chains, batch.packed,
                           finish);
      case LayerKind::kMix: return mix(plan.mix, from, in, out, finish);
      case LayerKind::kMaxPool: return greatest(k, finish);
      case LayerKind::kLogSumExp: return log_sum_exp(k, finish);
      case LayerKind::kMultiply:
        return pairs(from, in, values(layer.inputs[1]), net.buffers[layer.inputs[1]], out, finish,
                     [](int, Float a, Float b) { return a * b; });
      case LayerKind::kPointwise: {
        const float* factors = batch.packed + plan.factors;
        const auto factor = [=](int c) { return Vector::load(factors + c); };
        if (layer.inputs[1] < 0) {
          return pairs(from, in, from, in, out, finish,
                       [=](int c, Float a, Float) { return a * factor(c); });
        }
        return pairs(from, in, values(layer.inputs[1]), net.buffers[layer.inputs[1]], out, finish,
                     [=](int c, Float a, Float b) { return a * factor(c) + b * layer.factors[1]; });
      }
    }
  }

  // Results are f(channel, a, b) of two values of the same pixel and channel.
  template <class F>
  void pairs(const Type* a, const ConvBuffer& a_at, const Type* b, const ConvBuffer& b_at,
             const ConvBuffer& out, const Finish& finish, const F& f) const {
    each_pixel(out, [&](int64_t n, int64_t y, int64_t x) {
      const Type* one = a + n * a_at.chain + a_at.at(y, x);
      const Type* two = b + n * b_at.chain + b_at.at(y, x);
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

  void energies(int64_t first) const {
    for (int64_t n = 0; n < chains; ++n) {
      double total = batch.offset;  // a sum of many terms that may cancel
      for (const ConvHead& at : net.heads) {
        const ConvBuffer& buffer = net.buffers[at.value];
        const float* head = batch.head + at.begin;
        for (int64_t y = 0; y < buffer.height; ++y) {
          for (int64_t x = 0; x < buffer.width; ++x, head += buffer.pixel) {
            const Type* from = values(at.value) + n * buffer.chain + buffer.at(y, x);
            for (int c = 0; c < buffer.channels; ++c) total += double{N::widen(from[c])} * head[c];
          }
        }
      }
      batch.energies[first + n] = static_cast<float>(total);
    }
  }

  // Calls f(each), where each(to, channel, part) adds a part to the gradient of value v. The last
  // part turns it into the gradient before the activation. This may take the place of the values
  // that the derivative follows from.
  template <class F>
  void with_arrival(int v, Arrival arrival, const F& f) const {
    const Activation activation = v > 0 ? net.layers[v - 1].activation : Activation::kIdentity;
    const float* settings = v > 0 ? batch.packed + net.plans[v - 1].settings : nullptr;
    Type* grads = this->grads(v);
    const Type *values = this->values(v), *slopes = at(net.buffers[v].slopes);
    const auto arrive = [&](const auto& times_slope) {
      if (arrival.add) {
        f([=](int64_t to, int, Float part) {
          N::store(grads + to, times_slope(part + N::load(grads + to), to));
        });
      } else {
        f([=](int64_t to, int, Float part) { N::store(grads + to, times_slope(part, to)); });
      }
    };
    if (!arrival.last) return arrive([](Float part, int64_t) { return part; });
    with_slope<N>(activation, settings, values, slopes, arrive);
  }

  void begin_gradients() const {
    for (const ConvHead& at : net.heads) {
      const ConvBuffer& buffer = net.buffers[at.value];
      with_arrival(at.value, at.arrival, [&](const Finish& finish) {
        each_pixel(buffer, [&](int64_t n, int64_t y, int64_t x) {
          const float* head = batch.head + at.begin + (y * buffer.width + x) * buffer.pixel;
          finish_pixel(n * buffer.chain + buffer.at(y, x), buffer.channels, finish,
                       [&](int c) { return Vector::load(head + c); });
        });
      });
    }
  }

  // Takes the gradient before layer k's activation to the gradients of the values that it reads.
  void backward(size_t k) const {
    const ConvLayer& layer = net.layers[k];
    for (int i = 0; i < 2; ++i) {
      if (layer.inputs[i] < 0) continue;
      with_arrival(layer.inputs[i], net.plans[k].arrivals[i],
                   [&](const Finish& finish) { pull(k, i, finish); });
    }
  }

  // Computes the part of layer k in the gradient of its input i.
  void pull(size_t k, int i, const Finish& finish) const {
    const ConvLayer& layer = net.layers[k];
    const LayerPlan& plan = net.plans[k];
    const ConvBuffer &in = net.buffers[layer.inputs[i]], &out = net.buffers[k + 1];
    const Type* grad = grads(k + 1);
    switch (layer.kind) {
      case LayerKind::kConv:
        for (const ConvPass& pass : plan.backward) {
          run_pass<N>(pass, Ends<N>{grad, out.chain, in.chain}, chains, batch.packed, finish);
        }
        return;
      case LayerKind::kMix: return mix(plan.mix_back, grad, out, in, finish);
      case LayerKind::kMaxPool: return choose(k, finish);
      case LayerKind::kLogSumExp: return softmax(k, finish);
      case LayerKind::kMultiply: {
        const int other = layer.inputs[1 - i];
        return pairs(grad, out, values(other), net.buffers[other], in, finish,
                     [](int, Float g, Float b) { return g * b; });
      }
      case LayerKind::kPointwise: {
        const float* factors = batch.packed + plan.factors;
        if (i == 0) {
          return pairs(grad, out, grad, out, in, finish, [=](int c, Float g, Float) {
            return g * Vector::load(factors + c);
          });
        }
        return pairs(grad, out, grad, out, in, finish,
                     [&](int, Float g, Float) { return g * layer.factors[1]; });
      }
    }
  }

  // Writes the gradient of the state, in float32, to the caller's memory.
  void write(int64_t first) const {
    const ConvBuffer& buffer = net.buffers[0];
    if (!net.direct) {
      each_pixel(buffer, [&](int64_t n, int64_t y, int64_t x) {
        const Type* from = grads(0) + n * buffer.chain + buffer.at(y, x);
        float* grad = grad_at(first, n * buffer.chain + buffer.at(y, x));
        for (int c = 0; c < buffer.channels; ++c) {
          grad[c * batch.grad_strides[1]] = N::widen(from[c]);
        }
      });
      return;
    }
    if (net.spread.pixel > 0) {
      for (int64_t n = 0; n < chains; ++n) collect(first, n);
      return;
    }
    const auto each = [&](int64_t to, int channel, Float sum) {
      float* grad = grad_at(first, to - channel);
      const int count = std::min<int>(kLanes, buffer.channels - channel);
      for (int c = 0; c < count; ++c) grad[(channel + c) * batch.grad_strides[1]] = sum[c];
    };
    pull(0, 0, each);
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
    const Ends<N> ends{grads(1) + n * net.buffers[1].chain, 0, 0};
    const auto each = [&](int64_t to, int, Float sum) { Vector::store(products + to, sum); };
    run_pass<N>(net.spread.products, ends, 1, batch.packed, each);
    const int64_t channel = batch.grad_strides[1];
    float* chain = batch.grad + (first + n) * batch.grad_strides[0];
    for (const ConvPass& pass : net.plans[0].backward) {
      const int32_t *taps = pass.taps.data(), *end = taps + pass.taps.size();
      for (size_t k = 0; k < pass.to.size(); ++k) {
        const float* from = products + pass.from[k];
        float* grad = chain + pass.y[k] * batch.grad_strides[2] + pass.x[k] * batch.grad_strides[3];
        for (int c = 0; c < buffer.channels; c += 4) {
          Four::Float sum = Four::Float{};
          for (const int32_t* tap = taps; tap != end; ++tap) sum += Four::load(from + *tap + c);
          const int count = std::min(4, buffer.channels - c);
          for (int i = 0; i < count; ++i) grad[(c + i) * channel] = sum[i];
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
    chunk.begin_gradients();
    for (size_t k = top; k-- > size_t{net.direct};) chunk.backward(k);
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
