// Planning a conv net's passes, packing its weights, and sharing its chains among threads.
#include "convnet_cpu.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"
#include "step.h"

namespace fastlangevin {
namespace cpu {
namespace {

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

int outputs(const ConvLayer& layer, int axis, int inputs) {
  const int reach = layer.dilation[axis] * (layer.kernel[axis] - 1) + 1;
  return (inputs + 2 * layer.padding[axis] - reach) / layer.stride[axis] + 1;
}

// Where output o of a layer's axis begins to read, and where its last tap does.
int first_read(const ConvLayer& layer, int axis, int o) {
  return o * layer.stride[axis] - layer.padding[axis];
}

// For an input position that is `residue` modulo the stride: which kernel positions reach it, and
// from which output, counted from position / stride.
struct Reach {
  int kernel, offset;
};

std::vector<Reach> reaches(const ConvLayer& layer, int axis, int residue) {
  std::vector<Reach> found;
  for (int k = 0; k < layer.kernel[axis]; ++k) {
    const int distance = residue + layer.padding[axis] - k * layer.dilation[axis];
    if (distance % layer.stride[axis] == 0) found.push_back({k, distance / layer.stride[axis]});
  }
  return found;
}

// Widens a frame until positions first..last of an axis are inside.
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
  ConvPass pass{layer.in, layer.out, {}, {}, {}, {}, 0};
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
      ConvPass pass{layer.out, layer.in, {}, {}, {}, {}, 0};
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

// [block of output channels][tap][input channels, by one or two][output channel of the block][which]
void pack_pass(const ConvNet& net, const ConvPass& pass, const ConvLayer& layer, bool transposed,
               const float* weights, float* packed) {
  const int positions = layer.kernel[0] * layer.kernel[1], step = net.bfloat16 ? 2 : 1;
  const int lanes = net.kernels->lanes, whole = lanes * net.kernels->vectors;
  const auto weight = [&](int64_t i, int64_t o, int row) {
    const int64_t pair = transposed ? i * layer.in + o : o * layer.in + i;
    return o < pass.out && i < pass.in ? weights[pair * positions + row] : 0.0f;
  };
  for (int first = 0; first < pass.out;) {
    const int block = pass.out - first > lanes ? whole : lanes;
    for (int row : pass.rows) {
      for (int64_t i = 0; i < pass.in; i += step) {
        for (int o = first; o < first + block; ++o, ++packed) {
          if (step == 1) {
            *packed = weight(i, o, row);
          } else {
            const uint16_t two[2] = {to_bfloat16(weight(i, o, row)),
                                     to_bfloat16(weight(i + 1, o, row))};
            std::memcpy(packed, two, sizeof two);
          }
        }
      }
    }
    first += block;
  }
}

}  // namespace

ConvNet plan_convnet(std::vector<ConvLayer> layers, int height, int width, bool bfloat16) {
  const ConvKernels& kernels = conv_kernels();
  ConvNet net;
  net.kernels = &kernels, net.bfloat16 = bfloat16;
  net.buffers.push_back({height, width, layers.front().in});
  for (const ConvLayer& layer : layers) {
    const ConvBuffer& in = net.buffers.back();
    ConvBuffer out{outputs(layer, 0, in.height), outputs(layer, 1, in.width), layer.out};
    frame(layer, net.buffers.back(), out);
    net.buffers.push_back(out);
  }
  for (size_t k = 0; k < net.buffers.size(); ++k) {
    ConvBuffer& buffer = net.buffers[k];
    buffer.pixel = round_up(buffer.channels, kernels.lanes);
    buffer.row = buffer.pixel * (buffer.left + buffer.width + buffer.right);
    buffer.chain = buffer.row * (buffer.top + buffer.height + buffer.bottom);
    buffer.values = net.workspace;
    net.workspace += buffer.chain;
    if (k > 0 && layers[k - 1].activation != Activation::kLeakyReLU) {
      buffer.slopes = net.workspace;
      net.workspace += buffer.chain;
    }
  }
  net.workspace *= bfloat16 ? sizeof(uint16_t) : sizeof(float);
  for (size_t k = 0; k < layers.size(); ++k) {
    net.forward.push_back(plan_forward(layers[k], net.buffers[k], net.buffers[k + 1]));
    net.backward.push_back(plan_backward(layers[k], net.buffers[k], net.buffers[k + 1]));
    const auto place = [&](ConvPass& pass) {
      pass.weights = net.packed;
      const int64_t steps = bfloat16 ? (pass.in + 1) / 2 : pass.in;
      net.packed += static_cast<int64_t>(pass.rows.size()) * steps *
                    round_up(static_cast<int>(pass.out), kernels.lanes);
    };
    place(net.forward.back());
    for (ConvPass& pass : net.backward.back()) place(pass);
    net.biases.push_back(net.packed);
    net.packed += round_up(layers[k].out, kernels.lanes);
  }
  net.layers = std::move(layers);
  return net;
}

void pack_weights(const ConvNet& net, const std::vector<const float*>& weights,
                  const std::vector<const float*>& biases, float* packed) {
  for (size_t k = 0; k < net.layers.size(); ++k) {
    const ConvLayer& layer = net.layers[k];
    pack_pass(net, net.forward[k], layer, false, weights[k], packed + net.forward[k].weights);
    for (const ConvPass& pass : net.backward[k]) {
      pack_pass(net, pass, layer, true, weights[k], packed + pass.weights);
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
            static_cast<char*>(workspace) + k * net.workspace * batch.chunk);
    }
  });
}

}  // namespace cpu
}  // namespace fastlangevin
