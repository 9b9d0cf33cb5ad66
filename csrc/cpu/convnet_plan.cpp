// Plans a network: the passes of its layers, and where a thread stores its values and gradients.
#include <algorithm>

#include "cpu/convnet.h"
#include "cpu/pass_plan.h"
#include "cpu/tile_plan.h"
#include "cpu/tiles.h"

namespace fastlangevin {
namespace cpu {
namespace {

// The convolution whose input gradient a transposed one computes from images of this size.
ConvLayer convolution_of(const ConvLayer& layer, const ConvBuffer& in) {
  ConvLayer convolution = layer;
  convolution.kind = LayerKind::kConv;
  std::swap(convolution.in, convolution.out);
  convolution.height = in.height, convolution.width = in.width;
  return convolution;
}

bool is_smooth(Activation activation) {
  return activation != Activation::kIdentity && activation != Activation::kLeakyReLU;
}

// Whether the gradient of a layer is computed from the values that it has read.
bool rereads(LayerKind kind) {
  return kind == LayerKind::kMultiply || kind == LayerKind::kLogSumExp || kind == LayerKind::kNorm;
}

// Sets how parts of every value's gradient arrive, and returns how many there are.
std::vector<int> plan_arrivals(ConvNet& net) {
  std::vector<int> parts(net.buffers.size());
  std::vector<Arrival*> latest(net.buffers.size());
  for (ConvHead& head : net.heads) {
    head.arrival.add = parts[head.value]++ > 0;
    latest[head.value] = &head.arrival;
  }
  for (size_t k = net.layers.size(); k-- > 0;) {
    for (int i = 0; i < 2; ++i) {
      const int value = net.layers[k].inputs[i];
      if (value < 0) continue;
      net.plans[k].arrivals[i].add = parts[value]++ > 0;
      latest[value] = &net.plans[k].arrivals[i];
    }
  }
  for (Arrival* arrival : latest) {
    if (arrival) arrival->last = true;
  }
  return parts;
}

// The stride of pixels of whole vectors. Pixels that are a power of two apart would share a few
// sets of the first-level cache.
int64_t padded(int64_t channels, int lanes) {
  const int64_t pixel = round_up(channels, lanes);
  return pixel % 256 == 0 ? pixel + lanes : pixel;
}

// The channels that are multiplied at a time.
int step_of(Operands operands) { return operands == Operands::kFloat32 ? 1 : 2; }

// The numbers for each chain of a chunk, if all have this many.
int64_t of_chain(const ConvNet& net, int64_t numbers) {
  return round_up((numbers + net.chunk - 1) / net.chunk,
                  net.kernels->lanes * step_of(net.operands));
}

// Chooses the strides and the size of a buffer.
void place_pixels(const ConvNet& net, bool direct, ConvBuffer& buffer) {
  const int64_t chains = buffer.of_part ? net.part : net.chunk;
  const int lanes = net.kernels->lanes, step = step_of(net.operands);
  const bool tiled = net.kernels->tiles && !direct;
  // No vector is written to a state that one convolution reads, a number or pair at a time.
  buffer.stored = direct  ? round_up(buffer.channels, step)
                  : tiled ? tiled_channels(buffer.channels)
                          : padded(buffer.channels, lanes);
  buffer.pixel = tiled ? tiled_pixel(buffer.stored, chains) : buffer.stored;
  buffer.row = buffer.pixel * round_up(buffer.left + buffer.width + buffer.right, buffer.phases);
  const int64_t all =
      round_up(buffer.row * (buffer.top + buffer.height + buffer.bottom), lanes * step);
  // The rows of tiles are the chains of a pixel, which are next to each other.
  buffer.chain = tiled ? buffer.stored : all;
  // The last part of a chunk may have fewer chains, and reads as many as the others all the same.
  const int64_t parts = (net.chunk + net.part - 1) / net.part;
  const int64_t beyond = buffer.of_part ? 0 : (parts * net.part - net.chunk) * buffer.chain;
  const int64_t memory = tiled ? all + beyond : all * chains;
  buffer.size = of_chain(net, memory);
  buffer.part = buffer.of_part ? memory : net.part * buffer.chain;
}

// Finds the values that leading layers alone read, of whose chains none but those of a part are
// there at a time.
void find_values_of_parts(ConvNet& net) {
  for (size_t v = 0; v <= net.leading; ++v) net.buffers[v].of_part = net.leading > 0;
  for (size_t k = net.leading; k < net.layers.size(); ++k) {
    for (const int value : net.layers[k].inputs) {
      if (value >= 0) net.buffers[value].of_part = false;
    }
  }
  for (const ConvHead& head : net.heads) net.buffers[head.value].of_part = false;
}

// Groups the columns of values that convolutions of one stride read, where the rows of a tile are
// pixels. Passes at other strides then read pixels of every residue apart, which must be as many.
void group_columns(ConvNet& net) {
  for (size_t v = net.direct ? 1 : 0; v < net.buffers.size(); ++v) {
    ConvBuffer& buffer = net.buffers[v];
    int stride = 0;
    const int64_t chains = buffer.of_part ? net.part : net.chunk;
    bool grouped = chains > 1 && chains % kTileRows != 0;
    for (const ConvLayer& layer : net.layers) {
      if (layer.inputs[0] != int(v) && layer.inputs[1] != int(v)) continue;
      grouped = grouped && layer.kind != LayerKind::kTransposed;
      if (layer.kind != LayerKind::kConv) continue;
      if (stride == 0) stride = layer.stride[1];
      grouped = grouped && layer.stride[1] == stride;
    }
    if (v > 0) {
      const ConvLayer& from = net.layers[v - 1];
      const int width = from.inputs[0] < 0 ? 0 : net.buffers[from.inputs[0]].width;
      grouped = grouped && from.kind != LayerKind::kTransposed;
      if (from.kind == LayerKind::kConv) {
        grouped = grouped && stride > 0 && width % (from.stride[1] * stride) == 0;
      }
    }
    if (grouped && stride > 1 && buffer.height * buffer.width > 1) buffer.phases = stride;
  }
}

// Chooses where the values, slopes and gradients of every buffer are.
void place_buffers(ConvNet& net, const std::vector<int>& parts) {
  const int lanes = net.kernels->lanes, of_word = net.operands == Operands::kBFloat16 ? 2 : 1;
  for (size_t v = 0; v < net.buffers.size(); ++v) {
    ConvBuffer& buffer = net.buffers[v];
    place_pixels(net, v == 0 && net.direct, buffer);
    const auto reserve = [&](int64_t size) { return (net.workspace += size) - size; };
    const auto take = [&] { return reserve(buffer.size); };
    // Of all parts of a chunk, whose values take each other's place.
    const int64_t all_parts = (net.chunk + net.part - 1) / net.part * buffer.part;
    const auto keep = [&](int64_t numbers) { return reserve(of_chain(net, numbers)); };
    buffer.values = buffer.grads = take();
    bool kept = false;
    for (const ConvLayer& layer : net.layers) {
      const bool reads = layer.inputs[0] == int(v) || layer.inputs[1] == int(v);
      kept = kept || (reads && rereads(layer.kind));
    }
    if (v > 0) {
      const Activation activation = net.layers[v - 1].activation;
      if (is_smooth(activation)) buffer.slopes = buffer.of_part ? keep(all_parts) : take();
      if (activation == Activation::kLeakyReLU && buffer.of_part) {
        buffer.signs = keep(all_parts / (32 / of_word));
      }
      if (net.layers[v - 1].kind == LayerKind::kMaxPool) buffer.choices = take();
      if (net.layers[v - 1].kind == LayerKind::kNorm) {
        buffer.statistics = reserve(2 * round_up(buffer.channels, lanes) * of_word);
      }
      // The signs of the values are read when the last part of the gradient arrives.
      kept = kept || (activation == Activation::kLeakyReLU && parts[v] > 1);
    }
    if (kept) buffer.grads = take();
  }
  net.workspace *= sizeof(float) / of_word;
}

// Places the packed weights of a pass after those that are there, and returns the numbers that its
// tiles take.
int64_t place_pass(const ConvKernels& kernels, ConvPass& pass, int64_t& packed) {
  const WinogradTiles& tiles = pass.tiles;
  pass.weights = packed;
  packed += (tiles.used() ? tiles.products() : pass.tap_count()) * pass.steps * pass.matrix.planes *
            round_up(pass.out, kernels.lanes);
  if (!tiles.used()) return 0;
  return tiles.products() * tiles.block * (tiles.row + kernels.vectors * kernels.lanes);
}

}  // namespace

Convolution plan_convolution(const ConvLayer& layer, int height, int width, bool gradient) {
  const ConvKernels& kernels = conv_kernels(Operands::kFloat32);
  Convolution conv{&kernels, layer, gradient};
  ConvBuffer in{height, width, layer.in}, out{layer.height, layer.width, layer.out};
  widen_frames(layer, in, out);
  conv.read = gradient ? out : in;
  conv.written = {gradient ? height : layer.height, gradient ? width : layer.width,
                  gradient ? layer.in : layer.out};
  conv.read.pixel = padded(conv.read.channels, kernels.lanes);
  conv.written.pixel = conv.written.channels;
  for (ConvBuffer* buffer : {&conv.read, &conv.written}) {
    buffer->row = buffer->pixel * (buffer->left + buffer->width + buffer->right);
    buffer->chain = buffer->row * (buffer->top + buffer->height + buffer->bottom);
  }
  conv.passes = gradient ? plan_backward(layer, conv.written, conv.read, kernels.lanes)
                         : std::vector{plan_forward(layer, conv.read, conv.written, kernels.lanes)};
  double all = 0, saved = 0;
  for (ConvPass& pass : conv.passes) {
    const double products = double(pass.to.size()) * pass.rows.size();
    all += products, saved += products * pass.tiles.saving;
    if (!pass.tiles.used()) plan_steps(conv.read, 1, pass);
    conv.scratch = std::max(conv.scratch, place_pass(kernels, pass, conv.packed));
  }
  conv.saving = all > 0 ? saved / all : 0;
  return conv;
}

namespace {

// The most chains of a part. Rows of tiles are then pixels of one chain or of several.
constexpr int64_t kPart = 4;
// Values of a chunk that need more bytes than this do not stay in the second-level cache, together
// with the weights, until the next layer reads them.
constexpr int64_t kCachedBytes = 1 << 19;

// How many layers may run by parts: those whose values are too large for the cache, and whose
// weights, which every part reads, are not. Of their values, the backward pass must not need more
// than slopes and signs.
size_t leading_layers(const ConvNet& net) {
  const int64_t parts = (net.chunk + kPart - 1) / kPart;
  const int64_t bytes = net.operands == Operands::kBFloat16 ? 2 : 4;
  size_t count = 0;
  for (const ConvLayer& layer : net.layers) {
    const bool conv = layer.kind == LayerKind::kConv || layer.kind == LayerKind::kTransposed;
    if (!conv && layer.kind != LayerKind::kPointwise && layer.kind != LayerKind::kMix) break;
    const int64_t values = net.buffers[layer.inputs[0]].size * net.chunk * bytes;
    const int64_t weights =
        conv ? 2 * net.planes * layer.in * layer.out * layer.kernel[0] * layer.kernel[1] : 0;
    if (count > 0 && values < std::max(kCachedBytes, parts * weights)) break;
    ++count;
  }
  // Where a single layer would run by parts, no values would be read sooner.
  return parts > 1 && count > 1 ? count : 0;
}

}  // namespace

ConvNet plan_convnet(std::vector<ConvLayer> layers, int channels, int height, int width,
                     const std::vector<int32_t>& heads, Operands operands, int64_t chunk) {
  ConvNet net = plan_leading(layers, channels, height, width, heads, operands, chunk, 0);
  const size_t leading = net.kernels->tiles ? leading_layers(net) : 0;
  if (leading == 0) return net;
  ConvNet other =
      plan_leading(std::move(layers), channels, height, width, heads, operands, chunk, leading);
  // Parts do not pay if they leave rows of tiles empty.
  return product_cycles(other) <= 1.05 * product_cycles(net) ? other : net;
}

ConvNet plan_leading(std::vector<ConvLayer> layers, int channels, int height, int width,
                     const std::vector<int32_t>& heads, Operands operands, int64_t chunk,
                     size_t leading) {
  const ConvKernels& kernels = conv_kernels(operands);
  if (!kernels.tiles && operands != Operands::kBFloat16) operands = Operands::kFloat32;
  const int64_t planes = operands == Operands::kBFloat16x6   ? 3
                         : operands == Operands::kBFloat16x3 ? 2
                                                             : 1;
  const int lanes = kernels.lanes, step = step_of(operands);
  // Parts of one size, as far as possible.
  const int64_t parts = leading > 0 ? (chunk + kPart - 1) / kPart : 1;
  ConvNet net{&kernels,
              operands,
              chunk,
              (chunk + parts - 1) / parts,
              leading,
              planes,
              std::move(layers),
              {{height, width, channels}},
              std::vector<LayerPlan>(),
              {}};
  net.plans.resize(net.layers.size());
  for (const ConvLayer& layer : net.layers) {
    net.buffers.push_back({layer.height, layer.width, layer.out});
  }
  int readers = 0;
  for (size_t k = 0; k < net.layers.size(); ++k) {
    const ConvLayer& layer = net.layers[k];
    if (layer.kind == LayerKind::kConv) {
      widen_frames(layer, net.buffers[layer.inputs[0]], net.buffers[k + 1]);
    } else if (layer.kind == LayerKind::kTransposed) {
      ConvBuffer& in = net.buffers[layer.inputs[0]];
      widen_frames(convolution_of(layer, in), net.buffers[k + 1], in);
    }
    readers += (layer.inputs[0] == 0) + (layer.inputs[1] == 0);
  }
  for (const int32_t value : heads) {
    net.heads.push_back({value});
    readers += value == 0;
  }
  net.direct = readers == 1 && net.layers.front().kind == LayerKind::kConv;
  find_values_of_parts(net);
  if (kernels.tiles) group_columns(net);
  place_buffers(net, plan_arrivals(net));
  for (ConvHead& head : net.heads) {
    const ConvBuffer& buffer = net.buffers[head.value];
    head.begin = net.head_values;
    net.head_values += int64_t{buffer.height} * buffer.width * buffer.stored;
  }
  int64_t tiled_numbers = 0;
  int64_t chains = chunk;
  const auto place = [&](ConvPass& pass, const ConvBuffer& from, const ConvBuffer& to) {
    if (!pass.tiles.used()) plan_steps(from, step, pass);
    if (kernels.tiles) plan_matrix(from, to, chains, pass);
    pass.matrix.planes = planes;
    tiled_numbers = std::max(tiled_numbers, place_pass(kernels, pass, net.packed));
  };
  for (size_t k = 0; k < net.layers.size(); ++k) {
    const ConvLayer& layer = net.layers[k];
    LayerPlan& plan = net.plans[k];
    const ConvBuffer &in = net.buffers[std::max(layer.inputs[0], 0)], &out = net.buffers[k + 1];
    const int tiled = operands == Operands::kFloat32 ? lanes : 0;
    chains = k < leading ? net.part : chunk;
    if (layer.kind == LayerKind::kConv) {
      const bool direct = k == 0 && net.direct;
      // Transforms read whole vectors of channels, which the state may not have.
      plan.forward = {plan_forward(layer, in, out, direct ? 0 : tiled)};
      plan.backward = plan_backward(layer, in, out, direct ? 0 : tiled);
      if (direct && !kernels.tiles) plan_spread(layer, out, lanes, plan.backward, net.spread);
      if (direct && kernels.tiles && fits_quads(layer, in, lanes)) {
        plan.backward = {plan_quads(layer, in, out)};
      }
      place(plan.forward.front(), in, out);
      if (direct && net.spread.pixel > 0) {
        place(net.spread.products, out, out);
      } else {
        for (ConvPass& pass : plan.backward) place(pass, out, in);
      }
    } else if (layer.kind == LayerKind::kTransposed) {
      const ConvLayer convolution = convolution_of(layer, in);
      plan.forward = plan_backward(convolution, out, in, tiled);
      plan.backward = {plan_forward(convolution, out, in, tiled)};
      for (ConvPass& pass : plan.forward) place(pass, in, out);
      place(plan.backward.front(), out, in);
    } else if (!layer.links.empty()) {
      plan.mix = plan_mix(layer.links, in, out);
      plan.mix_back = plan_mix(reversed(layer.links), out, in);
    }
    const auto take = [&](int64_t words) { return (net.packed += words) - words; };
    plan.bias = take(round_up(layer.out, lanes));
    const bool weighs = layer.kind == LayerKind::kPointwise || layer.kind == LayerKind::kNorm;
    if (weighs) plan.factors = take(round_up(layer.out, lanes));
    plan.settings = take(lanes);
    if (layer.kind == LayerKind::kConstant) {
      plan.numbers = net.constants;
      net.constants += int64_t{layer.height} * layer.width * out.stored;
    }
  }
  if (planes > 1) {
    // The planes of one buffer, whose size is even.
    for (const ConvBuffer& buffer : net.buffers) {
      tiled_numbers = std::max(tiled_numbers, planes * chunk * buffer.size / 2);
    }
  }
  net.scratch = (net.spread.values + tiled_numbers) * sizeof(float);
  return net;
}

}  // namespace cpu
}  // namespace fastlangevin
