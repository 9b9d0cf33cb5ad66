// Plans the passes of a conv net, packs its weights and distributes its chains over threads.
#include "cpu/convnet.h"

#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"
#include "common/step.h"

namespace fastlangevin {
namespace cpu {
namespace {

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

int outputs(const ConvLayer& layer, int axis, int inputs) {
  const int reach = layer.dilation[axis] * (layer.kernel[axis] - 1) + 1;
  return (inputs + 2 * layer.padding[axis] - reach) / layer.stride[axis] + 1;
}

// The positions of the first and the last tap of output o along an axis of a layer.
int first_read(const ConvLayer& layer, int axis, int o) {
  return o * layer.stride[axis] - layer.padding[axis];
}

// The kernel positions that reach an input position with this residue modulo the stride, and the
// outputs from which they do, counted from position / stride.
struct Reach {
  int kernel, offset;
};

std::vector<Reach> reaches(const ConvLayer& layer, int axis, int residue) {
  std::vector<Reach> found;
  for (int k = 0; k < layer.kernel[axis]; ++k) {
    const int distance = residue + layer.padding[axis] - k * layer.dilation[axis];
    if (distance % layer.stride[axis] == 0) found.push_back({k, distance / layer.stride[axis]});
  }
  std::reverse(found.begin(), found.end());  // in the order of memory
  return found;
}

// Widens a frame until positions first..last of an axis are inside it.
void widen(int32_t& before, int32_t& after, int extent, int first, int last) {
  before = std::max(before, -first);
  after = std::max(after, last - (extent - 1));
}

void frame(const ConvLayer& layer, ConvBuffer& in, ConvBuffer& out) {
  for (int axis = 0; axis < 2; ++axis) {
    const int inputs = axis ? in.width : in.height, results = axis ? out.width : out.height;
    const int last = first_read(layer, axis, results - 1) +
                     layer.dilation[axis] * (layer.kernel[axis] - 1);
    widen(axis ? in.left : in.top, axis ? in.right : in.bottom, inputs,
          first_read(layer, axis, 0), last);
    for (int residue = 0; residue < std::min(layer.stride[axis], inputs); ++residue) {
      const int steps = (inputs - 1 - residue) / layer.stride[axis];
      for (const Reach& reach : reaches(layer, axis, residue)) {
        widen(axis ? out.left : out.top, axis ? out.right : out.bottom, results, reach.offset,
              steps + reach.offset);
      }
    }
  }
}

ConvPass plan_forward(const ConvLayer& layer, const ConvBuffer& in, const ConvBuffer& out) {
  ConvPass pass{layer.in, layer.out};
  for (int y = 0; y < out.height; ++y) {
    for (int x = 0; x < out.width; ++x) {
      pass.from.push_back(in.at(first_read(layer, 0, y), first_read(layer, 1, x)));
      pass.to.push_back(out.at(y, x));
    }
  }
  for (int y = 0; y < layer.kernel[0]; ++y) {
    for (int x = 0; x < layer.kernel[1]; ++x) {
      pass.taps.push_back(y * layer.dilation[0] * in.row + x * layer.dilation[1] * in.pixel);
      pass.rows.push_back(y * layer.kernel[1] + x);
    }
  }
  return pass;
}

std::vector<ConvPass> plan_backward(const ConvLayer& layer, const ConvBuffer& in,
                                    const ConvBuffer& out) {
  std::vector<ConvPass> passes;
  for (int ry = 0; ry < std::min(layer.stride[0], in.height); ++ry) {
    for (int rx = 0; rx < std::min(layer.stride[1], in.width); ++rx) {
      ConvPass pass{layer.out, layer.in};
      for (int y = ry; y < in.height; y += layer.stride[0]) {
        for (int x = rx; x < in.width; x += layer.stride[1]) {
          pass.from.push_back(out.at(y / layer.stride[0], x / layer.stride[1]));
          pass.to.push_back(in.at(y, x));
        }
      }
      for (const Reach& down : reaches(layer, 0, ry)) {
        for (const Reach& along : reaches(layer, 1, rx)) {
          pass.taps.push_back(down.offset * out.row + along.offset * out.pixel);
          pass.rows.push_back(down.kernel * layer.kernel[1] + along.kernel);
        }
      }
      passes.push_back(std::move(pass));
    }
  }
  return passes;
}

// Merges runs of taps that are adjacent in memory into one tap each, if all runs have one length.
void join_taps(ConvPass& pass, int step) {
  const int channels = round_up(static_cast<int>(pass.in), step);
  const std::vector<int32_t> taps = std::move(pass.taps);
  const auto runs_of = [&](size_t run) {
    for (size_t k = 0; k < taps.size(); ++k) {
      if (k % run != 0 && taps[k] != taps[k - 1] + channels) return false;
    }
    return taps.size() % run == 0;
  };
  size_t run = std::max<size_t>(1, taps.size());
  while (!runs_of(run)) --run;
  pass.taps.clear();
  for (size_t k = 0; k < taps.size(); k += run) pass.taps.push_back(taps[k]);
  pass.steps = static_cast<int64_t>(run) * channels / step;
}

// Plans the products of a layer's spread gradient if they are fewer than those of its passes. The
// passes then read these products.
void plan_spread(const ConvLayer& layer, const ConvBuffer& out, int lanes,
                 std::vector<ConvPass>& passes, ConvSpread& spread) {
  const int positions = layer.kernel[0] * layer.kernel[1];
  const int64_t pixel = round_up(positions * layer.in + 3, lanes);  // read four at a time
  int64_t multiplied = 0;
  for (const ConvPass& pass : passes) {
    multiplied += static_cast<int64_t>(pass.to.size() * pass.rows.size()) *
                  round_up(layer.in, lanes);
  }
  if (out.height * out.width * pixel >= multiplied) return;
  spread.pixel = pixel;
  spread.values = out.chain / out.pixel * pixel;
  spread.products = {layer.out, positions * layer.in};
  spread.products.taps = spread.products.rows = {0};
  for (int y = 0; y < out.height; ++y) {
    for (int x = 0; x < out.width; ++x) {
      spread.products.from.push_back(out.at(y, x));
      spread.products.to.push_back(out.at(y, x) / out.pixel * pixel);
    }
  }
  for (ConvPass& pass : passes) {
    for (int32_t& from : pass.from) from = from / out.pixel * pixel;
    for (size_t t = 0; t < pass.taps.size(); ++t) {
      pass.taps[t] = pass.taps[t] / out.pixel * pixel + pass.rows[t] * layer.in;
    }
  }
}

// Packs the weights at(input channel, output channel)[position], or null beyond the last, as [block
// of output channels][kernel position][one or two input channels][output channel of the
// block][which of the two].
template <class At>
void pack_pass(const ConvNet& net, const ConvPass& pass, int threads, const At& at,
               float* packed) {
  const int lanes = net.kernels->lanes, whole = lanes * net.kernels->vectors;
  const int64_t step = net.bfloat16 ? 2 : 1, steps = (pass.in + step - 1) / step;
  const int64_t rows = pass.rows.size(), blocks = (pass.out + whole - 1) / whole;
  constexpr int64_t kFew = 4;
  packed += pass.weights;
  parallel_for(blocks, threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * whole, block = pass.out - begin > lanes ? whole : lanes;
      float* to = packed + begin * rows * steps;
      // A few steps at a time, through memory that stays in the cache: the words of two kernel
      // positions are usually a power of two apart and would evict each other.
      std::vector<float> few(rows * kFew * block);
      for (int64_t s = 0; s < steps; s += kFew) {
        const int64_t count = std::min(kFew, steps - s);
        for (int64_t o = 0; o < block; ++o) {
          for (int64_t k = 0; k < count; ++k) {
            const int64_t i = (s + k) * step;
            const float* one = at(i, begin + o);
            const float* two = step == 2 ? at(i + 1, begin + o) : nullptr;
            for (int64_t r = 0; r < rows; ++r) {
              float word = one ? one[pass.rows[r]] : 0.0f;
              if (step == 2) {
                const uint16_t pair[2] = {to_bfloat16(word),
                                          to_bfloat16(two ? two[pass.rows[r]] : 0.0f)};
                std::memcpy(&word, pair, sizeof pair);
              }
              few[(r * kFew + k) * block + o] = word;
            }
          }
        }
        for (int64_t r = 0; r < rows; ++r) {
          std::copy_n(few.data() + r * kFew * block, count * block, to + (r * steps + s) * block);
        }
      }
    }
  });
}

}  // namespace

ConvNet plan_convnet(std::vector<ConvLayer> layers, int height, int width, bool bfloat16) {
  const ConvKernels& kernels = conv_kernels();
  ConvNet net;
  net.kernels = &kernels, net.bfloat16 = bfloat16;
  const int step = bfloat16 ? 2 : 1;
  net.buffers.push_back({height, width, layers.front().in});
  for (const ConvLayer& layer : layers) {
    const ConvBuffer& in = net.buffers.back();
    ConvBuffer out{outputs(layer, 0, in.height), outputs(layer, 1, in.width), layer.out};
    frame(layer, net.buffers.back(), out);
    net.buffers.push_back(out);
  }
  for (size_t k = 0; k < net.buffers.size(); ++k) {
    ConvBuffer& buffer = net.buffers[k];
    // No vector is written to the first buffer, which is read one number or pair at a time.
    buffer.pixel = round_up(buffer.channels, k == 0 ? step : kernels.lanes);
    // Pixels that are a power of two apart would share a few sets of the first-level cache.
    if (buffer.pixel % 256 == 0) buffer.pixel += kernels.lanes;
    buffer.row = buffer.pixel * (buffer.left + buffer.width + buffer.right);
    buffer.chain =
        round_up(buffer.row * (buffer.top + buffer.height + buffer.bottom), kernels.lanes * step);
    buffer.values = net.workspace;
    net.workspace += buffer.chain;
    if (k > 0 && layers[k - 1].activation != Activation::kLeakyReLU) {
      buffer.slopes = net.workspace;
      net.workspace += buffer.chain;
    }
  }
  net.workspace *= sizeof(float) / step;
  const auto place = [&](ConvPass& pass) {
    join_taps(pass, step);
    pass.weights = net.packed;
    net.packed += static_cast<int64_t>(pass.taps.size()) * pass.steps *
                  round_up(static_cast<int>(pass.out), kernels.lanes);
  };
  for (size_t k = 0; k < layers.size(); ++k) {
    const ConvBuffer &in = net.buffers[k], &out = net.buffers[k + 1];
    net.forward.push_back(plan_forward(layers[k], in, out));
    net.backward.push_back(plan_backward(layers[k], in, out));
    if (k == 0) plan_spread(layers[k], out, kernels.lanes, net.backward[k], net.spread);
    place(net.forward.back());
    if (k == 0 && net.spread.pixel > 0) {
      place(net.spread.products);
    } else {
      for (ConvPass& pass : net.backward.back()) place(pass);
    }
    net.biases.push_back(net.packed);
    net.packed += round_up(layers[k].out, kernels.lanes);
  }
  net.scratch = net.spread.values * sizeof(float);
  net.layers = std::move(layers);
  return net;
}

void pack_weights(const ConvNet& net, const std::vector<const float*>& weights,
                  const std::vector<const float*>& biases, float* packed, int threads) {
  for (size_t k = 0; k < net.layers.size(); ++k) {
    const ConvLayer& layer = net.layers[k];
    const int positions = layer.kernel[0] * layer.kernel[1];
    const auto at = [&](int64_t o, int64_t i) -> const float* {
      if (o >= layer.out || i >= layer.in) return nullptr;
      return weights[k] + (o * layer.in + i) * positions;
    };
    const auto forward = [&](int64_t i, int64_t o) { return at(o, i); };
    const auto spread = [&](int64_t o, int64_t i) -> const float* {
      const float* all = i < positions * layer.in ? at(o, i % layer.in) : nullptr;
      return all ? all + i / layer.in : nullptr;
    };
    pack_pass(net, net.forward[k], threads, forward, packed);
    if (k == 0 && net.spread.pixel > 0) {
      pack_pass(net, net.spread.products, threads, spread, packed);
    } else {
      for (const ConvPass& pass : net.backward[k]) pack_pass(net, pass, threads, at, packed);
    }
    float* bias = packed + net.biases[k];
    std::fill_n(bias, round_up(layer.out, net.kernels->lanes), 0.0f);
    if (biases[k] != nullptr) std::copy_n(biases[k], layer.out, bias);
  }
}

void convnet_score(const ConvNet& net, const ConvBatch& batch, void* workspace, int threads) {
  if (batch.chains == 0) return;
  const int team = static_cast<int>(std::min<int64_t>(threads, batch.chains));
  const auto score = net.bfloat16 ? net.kernels->score_bfloat16 : net.kernels->score;
  parallel_for(team, team, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      score(net, batch, batch.chains * k / team, batch.chains * (k + 1) / team,
            static_cast<char*>(workspace) + k * (net.workspace * batch.chunk + net.scratch));
    }
  });
}

}  // namespace cpu
}  // namespace fastlangevin
