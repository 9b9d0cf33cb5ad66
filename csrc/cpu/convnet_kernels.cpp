// Energies and input gradients of networks with one instruction set, FASTLANGEVIN_ISA. This file is
// compiled once for each.
//
// A thread takes its chains, a chunk at a time, forward and backward through the whole network. The
// output of a layer is then still in its cache when the next layer reads it, and no thread waits
// for another. No result depends on which chains share a chunk.
#include "cpu/convnet.h"
#include "cpu/layers.h"
#include "cpu/winograd.h"
#ifdef FASTLANGEVIN_TILES
#include "cpu/tile_products.h"
#endif

namespace fastlangevin {
namespace FASTLANGEVIN_ISA {
namespace {

// Whether leading layers may take a part of a chunk at a time.
#ifdef FASTLANGEVIN_TILES
constexpr bool kByParts = true;
#else
constexpr bool kByParts = false;
#endif

// The passes of one chunk of chains through the network, or of a part of one.
template <class N>
struct Chunk : ChunkLayers<N> {
  using Layers = ChunkLayers<N>;
  using Type = typename N::Type;
  using Layers::at, Layers::batch, Layers::chains, Layers::each_pixel, Layers::finish_pixel;
  using Layers::grads, Layers::net, Layers::signs, Layers::slopes, Layers::values;
  using Layers::workspace;

  // Memory of the thread that belongs to no chain: that of the spread products, whose frame stays
  // zero, and that of the tiles.
  float* products() const {
    return reinterpret_cast<float*>(reinterpret_cast<char*>(workspace) +
                                    net.workspace * batch.chunk);
  }
  float* tiles() const { return products() + net.spread.values; }

  // What the passes of a convolution read.
  auto source(const Type* from, const ConvBuffer& in, const ConvBuffer& out) const {
    return prepare(Ends<N>{from, in.chain, out.chain}, in, chains, batch.chunk, net.planes,
                   tiles());
  }

  void read(int64_t first) const {
    const int64_t* s = batch.x_strides;
    const ConvBuffer& buffer = net.buffers[0];
    // Vectors read padded channels, and steps of two read one too many. A NaN may be left there.
    const int end = static_cast<int>(buffer.stored);
    each_pixel(buffer, [&](int64_t n, int64_t y, int64_t x) {
      const float* from = batch.x + (first + n) * s[0] + y * s[2] + x * s[3];
      Type* to = values(0) + n * buffer.chain + buffer.at(y, x);
      for (int c = 0; c < buffer.channels; ++c) to[c] = N::narrow(from[c * s[1]]);
      for (int c = buffer.channels; c < end; ++c) to[c] = Type{};
    });
  }

  void read_constants(int64_t first) const {
    for (size_t k = 0; k < net.layers.size(); ++k) {
      if (net.layers[k].kind != LayerKind::kConstant) continue;
      const ConvBuffer& buffer = net.buffers[k + 1];
      each_pixel(buffer, [&](int64_t n, int64_t y, int64_t x) {
        const float* from = batch.constants + (first + n) * batch.constants_stride +
                            net.plans[k].numbers + (y * buffer.width + x) * buffer.stored;
        Type* to = values(k + 1) + n * buffer.chain + buffer.at(y, x);
        for (int c = 0; c < buffer.channels; c += kLanes) N::store(to + c, Vector::load(from + c));
      });
    }
  }

  void forward(size_t k) const {
    const ConvLayer& layer = net.layers[k];
    if (layer.kind == LayerKind::kConstant) return;
    const LayerPlan& plan = net.plans[k];
    const float* bias = batch.packed + plan.bias;
    const float* settings = batch.packed + plan.settings;
    Type* values = this->values(k + 1);
    uint8_t* signs = this->signs(k + 1);
    with_activation(layer.activation, settings, [&](const auto& activation) {
      const int64_t slopes = activation.kSmooth ? this->slopes(k + 1) - values : 0;
      const auto each = [=](int64_t to, int channel, Float result) {
        Float slope;
        const Float z = result + Vector::load(bias + channel);
        N::store(values + to, activation(z, slope));
        if constexpr (activation.kSmooth) N::store(values + to + slopes, slope);
      };
      if (signs == nullptr) return compute(k, each);
      if constexpr (kByParts && activation.kLeaky) {
        const float leak = settings[0];
        compute(k, [=](int64_t to, int channel, Float result) {
          each(to, channel, result);
          store_signs(signs, to, N::load(values + to), leak);
        });
      }
    });
  }

  // Computes the results of layer k, before its bias and activation.
  void compute(size_t k, const Finish& finish) const {
    const ConvLayer& layer = net.layers[k];
    const LayerPlan& plan = net.plans[k];
    const ConvBuffer &in = net.buffers[layer.inputs[0]], &out = net.buffers[k + 1];
    const Type* from = values(layer.inputs[0]);
    switch (layer.kind) {
      case LayerKind::kConstant:
        return;
      case LayerKind::kConv:
      case LayerKind::kTransposed: {
        const auto read = source(from, in, out);
        for (const ConvPass& pass : plan.forward) {
          run(pass, read, chains, batch.packed, finish, tiles());
        }
        return;
      }
      case LayerKind::kMix:
        return this->mix(plan.mix, from, in, out, finish);
      case LayerKind::kMaxPool:
        return this->greatest(k, finish);
      case LayerKind::kLogSumExp:
        return this->log_sum_exp(k, finish);
      case LayerKind::kNorm:
        return this->normalise(k, finish);
      case LayerKind::kMultiply:
        return this->pairs(from, in, values(layer.inputs[1]), net.buffers[layer.inputs[1]], out,
                           finish, [](int, Float a, Float b) { return a * b; });
      case LayerKind::kPointwise: {
        const float* factors = batch.packed + plan.factors;
        const auto factor = [=](int c) { return Vector::load(factors + c); };
        if (layer.inputs[1] < 0) {
          return this->pairs(from, in, from, in, out, finish,
                             [=](int c, Float a, Float) { return a * factor(c); });
        }
        return this->pairs(
            from, in, values(layer.inputs[1]), net.buffers[layer.inputs[1]], out, finish,
            [=](int c, Float a, Float b) { return a * factor(c) + b * layer.factors[1]; });
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
          for (int64_t x = 0; x < buffer.width; ++x, head += buffer.stored) {
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
    const Type *values = this->values(v), *slopes = this->slopes(v);
    const uint8_t* signs = this->signs(v);
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
    if constexpr (kByParts) {
      if (signs != nullptr) return with_signs(settings[0], signs, arrive);
    }
    with_slope<N>(activation, settings, values, slopes, arrive);
  }

  void begin_gradients() const {
    for (const ConvHead& at : net.heads) {
      const ConvBuffer& buffer = net.buffers[at.value];
      with_arrival(at.value, at.arrival, [&](const Finish& finish) {
        each_pixel(buffer, [&](int64_t n, int64_t y, int64_t x) {
          const float* head = batch.head + at.begin + (y * buffer.width + x) * buffer.stored;
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
      const int value = layer.inputs[i];
      if (value < 0) continue;
      if (value > 0 && net.layers[value - 1].kind == LayerKind::kConstant) continue;
      with_arrival(value, net.plans[k].arrivals[i],
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
      case LayerKind::kConstant:
        return;
      case LayerKind::kConv:
      case LayerKind::kTransposed: {
        const auto from = source(grad, out, in);
        for (const ConvPass& pass : plan.backward) {
          run(pass, from, chains, batch.packed, finish, tiles());
        }
        return;
      }
      case LayerKind::kMix:
        return this->mix(plan.mix_back, grad, out, in, finish);
      case LayerKind::kMaxPool:
        return this->choose(k, finish);
      case LayerKind::kLogSumExp:
        return this->softmax(k, finish);
      case LayerKind::kNorm:
        return this->normalise_back(k, finish);
      case LayerKind::kMultiply: {
        const int other = layer.inputs[1 - i];
        return this->pairs(grad, out, values(other), net.buffers[other], in, finish,
                           [](int, Float g, Float b) { return g * b; });
      }
      case LayerKind::kPointwise: {
        const float* factors = batch.packed + plan.factors;
        if (i == 0) {
          return this->pairs(grad, out, grad, out, in, finish,
                             [=](int c, Float g, Float) { return g * Vector::load(factors + c); });
        }
        return this->pairs(grad, out, grad, out, in, finish,
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
        float* grad = grad_of(first + n, y, x);
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
    const auto place = [&](int64_t at, int down, int along) {
      const int64_t in_chain = at % buffer.chain;
      return grad_of(first + at / buffer.chain, in_chain / buffer.row - buffer.top + down,
                     in_chain % buffer.row / buffer.pixel - buffer.left + along);
    };
    if (net.plans[0].backward.front().quads) {
      return pull(0, 0, [&](int64_t to, int channel, Float sum) {
        const int count = std::min<int>(kLanes, 4 * buffer.channels - channel);
        for (int k = 0; k < count; ++k) {
          const int pixel = (channel + k) / buffer.channels, c = (channel + k) % buffer.channels;
          place(to - channel, pixel / 2, pixel % 2)[c * batch.grad_strides[1]] = sum[k];
        }
      });
    }
    const auto each = [&](int64_t to, int channel, Float sum) {
      float* grad = place(to - channel, 0, 0);
      const int count = std::min<int>(kLanes, buffer.channels - channel);
      for (int c = 0; c < count; ++c) grad[(channel + c) * batch.grad_strides[1]] = sum[c];
    };
    pull(0, 0, each);
  }

  float* grad_of(int64_t chain, int64_t y, int64_t x) const {
    const int64_t* s = batch.grad_strides;
    return batch.grad + chain * s[0] + y * s[2] + x * s[3];
  }

  // Writes the gradient of one chain if it is spread.
  void collect(int64_t first, int64_t n) const {
    using Four = Register<4>;
    const ConvBuffer& buffer = net.buffers[0];
    float* products = this->products();
    const Ends<N> ends{grads(1) + n * net.buffers[1].chain, 0, 0};
    const auto each = [&](int64_t to, int, Float sum) { Vector::store(products + to, sum); };
    const auto source = prepare(ends, net.buffers[1], 1, 1, 1, tiles());
    run(net.spread.products, source, 1, batch.packed, each, tiles());
    const int64_t channel = batch.grad_strides[1];
    float* chain = batch.grad + (first + n) * batch.grad_strides[0];
    // Several pixels at a time, since each is one chain of dependent additions.
    constexpr size_t kTogether = 4;
    for (const ConvPass& pass : net.plans[0].backward) {
      const int32_t *taps = pass.taps.data(), *end = taps + pass.taps.size();
      for (size_t k = 0; k < pass.to.size(); k += kTogether) {
        const size_t pixels = std::min(kTogether, pass.to.size() - k);
        for (int c = 0; c < buffer.channels; c += 4) {
          const float* from[kTogether];
          Four::Float sums[kTogether] = {};
          for (size_t p = 0; p < kTogether; ++p) {
            from[p] = products + pass.from[k + std::min(p, pixels - 1)] + c;
          }
          for (const int32_t* tap = taps; tap != end; ++tap) {
            for (size_t p = 0; p < kTogether; ++p) sums[p] += Four::load(from[p] + *tap);
          }
          for (size_t p = 0; p < pixels; ++p) {
            float* grad = chain + pass.y[k + p] * batch.grad_strides[2] +
                          pass.x[k + p] * batch.grad_strides[3] + c * channel;
            const int count = std::min(4, buffer.channels - c);
            for (int i = 0; i < count; ++i) grad[i * channel] = sums[p][i];
          }
        }
      }
    }
  }
};

template <class N>
void score(const ConvNet& net, const ConvBatch& batch, int64_t first, int64_t last,
           void* workspace) {
  const size_t top = net.layers.size(), leading = net.leading, bottom = net.direct;
  auto* memory = static_cast<typename N::Type*>(workspace);
  const int64_t part = leading > 0 ? net.part : batch.chunk;
  for (; first < last; first += batch.chunk) {
    const Chunk<N> chunk{{net, batch, memory, std::min(last - first, batch.chunk)}};
    const auto each_part = [&](const auto& f) {
      for (int64_t begin = 0; begin < chunk.chains; begin += part) {
        f(Chunk<N>{{net, batch, memory, std::min(chunk.chains - begin, part), begin}},
          first + begin);
      }
    };
    chunk.read_constants(first);
    each_part([&](const Chunk<N>& chains, int64_t at) {
      chains.read(at);
      for (size_t k = 0; k < leading; ++k) chains.forward(k);
    });
    for (size_t k = leading; k < top; ++k) chunk.forward(k);
    if (batch.energies != nullptr) chunk.energies(first);
    chunk.begin_gradients();
    for (size_t k = top; k-- > std::max(leading, bottom);) chunk.backward(k);
    each_part([&](const Chunk<N>& chains, int64_t at) {
      for (size_t k = leading; k-- > bottom;) chains.backward(k);
      chains.write(at);
    });
  }
}

#ifndef FASTLANGEVIN_TILES
void convolve(const Convolution& conv, const ConvolutionBatch& batch, int64_t first, int64_t last,
              int64_t chunk, float* memory) {
  const ConvBuffer &in = conv.read, &out = conv.written;
  for (; first < last; first += chunk) {
    const int64_t chains = std::min(last - first, chunk);
    const float* from = batch.x + first * in.height * in.width * in.channels;
    for (int64_t n = 0; n < chains; ++n) {
      for (int y = 0; y < in.height; ++y) {
        for (int x = 0; x < in.width; ++x, from += in.channels) {
          std::copy_n(from, in.channels, memory + n * in.chain + in.at(y, x));
        }
      }
    }
    float* to = batch.out + first * out.chain;
    const auto finish = [&](const Finish& each) {
      for (const ConvPass& pass : conv.passes) {
        run(pass, Ends<Float32>{memory, in.chain, out.chain}, chains, batch.packed, each,
            memory + chains * in.chain);
      }
    };
    const float *bias = batch.bias, leak = batch.leak;
    if (bias == nullptr) {
      finish([=](int64_t at, int, Float sum) { Vector::store(to + at, sum); });
    } else if (leak == 1.0f) {
      finish([=](int64_t at, int channel, Float sum) {
        Vector::store(to + at, sum + Vector::load(bias + channel));
      });
    } else {
      finish([=](int64_t at, int channel, Float sum) {
        const Float z = sum + Vector::load(bias + channel);
        Vector::store(to + at, z > 0.0f ? z : z * leak);
      });
    }
  }
}
#endif

}  // namespace
}  // namespace FASTLANGEVIN_ISA

namespace cpu {
#ifdef FASTLANGEVIN_TILES
const ConvKernels FASTLANGEVIN_CONV_KERNELS = {
    FASTLANGEVIN_ISA::kColumns,
    2,
    true,
    FASTLANGEVIN_ISA::score<FASTLANGEVIN_ISA::TiledFloat32>,
    FASTLANGEVIN_ISA::score<FASTLANGEVIN_ISA::TiledBFloat16>,
    nullptr};
#else
const ConvKernels FASTLANGEVIN_CONV_KERNELS = {FASTLANGEVIN_ISA::kLanes,
                                               FASTLANGEVIN_ISA::kVectors,
                                               false,
                                               FASTLANGEVIN_ISA::score<FASTLANGEVIN_ISA::Float32>,
                                               FASTLANGEVIN_ISA::score<FASTLANGEVIN_ISA::BFloat16>,
                                               FASTLANGEVIN_ISA::convolve};
#endif
}  // namespace cpu
}  // namespace fastlangevin
