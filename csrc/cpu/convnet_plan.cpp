// Plans the passes of a network.
#include <algorithm>

#include "cpu/convnet.h"
#include "cpu/tile_plan.h"
#include "cpu/winograd_plan.h"

namespace fastlangevin {
namespace cpu {
namespace {

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
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

// Whether all of a convolution's input is one window, so that no gradient is a sum over outputs.
bool one_output(const ConvLayer& layer) { return layer.height == 1 && layer.width == 1; }

// Whether the taps of every phase along an axis are adjacent.
bool adjacent(const ConvLayer& layer, int axis) {
  return layer.dilation[axis] == 1 || layer.kernel[axis] == 1;
}

// The taps of each phase of a convolution along an axis, or 0 if they differ or are not adjacent.
int phase_taps(const ConvLayer& layer, int axis) {
  const int kernel = layer.kernel[axis], stride = layer.stride[axis];
  return kernel % stride == 0 && adjacent(layer, axis) ? kernel / stride : 0;
}

// Frames are wide enough for whole tiles, too, which may begin inside of an image and end outside.
void frame(const ConvLayer& layer, ConvBuffer& in, ConvBuffer& out) {
  for (int axis = 0; axis < 2; ++axis) {
    const int inputs = axis ? in.width : in.height, results = axis ? out.width : out.height;
    const int most = covered(results, phase_taps(layer, axis));
    const int last = first_read(layer, axis, most - 1) +
                     layer.dilation[axis] * (layer.kernel[axis] - 1);
    widen(axis ? in.left : in.top, axis ? in.right : in.bottom, inputs,
          first_read(layer, axis, 0), last);
    if (one_output(layer)) continue;
    for (int residue = 0; residue < std::min(layer.stride[axis], inputs); ++residue) {
      const std::vector<Reach> all = reaches(layer, axis, residue);
      const int pixels = (inputs - 1 - residue) / layer.stride[axis] + 1;
      for (const Reach& reach : all) {
        widen(axis ? out.left : out.top, axis ? out.right : out.bottom, results, reach.offset,
              covered(pixels, all.size()) - 1 + reach.offset);
      }
    }
  }
}

ConvPass plan_forward(const ConvLayer& layer, const ConvBuffer& in, const ConvBuffer& out,
                      int lanes) {
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
  if (lanes > 0) {
    plan_tiles({{out.height, out.width}, {phase_taps(layer, 0), phase_taps(layer, 1)},
                {layer.stride[0], layer.stride[1]},
                {static_cast<int32_t>(in.row), static_cast<int32_t>(in.pixel)}}, lanes, pass);
  }
  return pass;
}

// The passes to the input of a convolution with one output: every pixel has its own weights.
std::vector<ConvPass> plan_scatter(const ConvLayer& layer, const ConvBuffer& in,
                                   const ConvBuffer& out) {
  std::vector<ConvPass> passes;
  for (int y = 0; y < in.height; ++y) {
    for (int x = 0; x < in.width; ++x) {
      const int down = y + layer.padding[0], along = x + layer.padding[1];
      ConvPass pass{layer.out, layer.in};
      pass.from = {static_cast<int32_t>(out.at(0, 0))};
      pass.to = {static_cast<int32_t>(in.at(y, x))};
      pass.y = {y}, pass.x = {x};
      const int ky = down / layer.dilation[0], kx = along / layer.dilation[1];
      if (down % layer.dilation[0] == 0 && along % layer.dilation[1] == 0 &&
          ky < layer.kernel[0] && kx < layer.kernel[1]) {
        pass.taps = {0};
        pass.rows = {ky * layer.kernel[1] + kx};
      }
      passes.push_back(std::move(pass));
    }
  }
  return passes;
}

std::vector<ConvPass> plan_backward(const ConvLayer& layer, const ConvBuffer& in,
                                    const ConvBuffer& out, int lanes) {
  if (one_output(layer)) return plan_scatter(layer, in, out);
  std::vector<ConvPass> passes;
  for (int ry = 0; ry < std::min(layer.stride[0], in.height); ++ry) {
    for (int rx = 0; rx < std::min(layer.stride[1], in.width); ++rx) {
      ConvPass pass{layer.out, layer.in};
      for (int y = ry; y < in.height; y += layer.stride[0]) {
        for (int x = rx; x < in.width; x += layer.stride[1]) {
          pass.from.push_back(out.at(y / layer.stride[0], x / layer.stride[1]));
          pass.to.push_back(in.at(y, x));
          pass.y.push_back(y), pass.x.push_back(x);
        }
      }
      const std::vector<Reach> downs = reaches(layer, 0, ry), alongs = reaches(layer, 1, rx);
      for (const Reach& down : downs) {
        for (const Reach& along : alongs) {
          pass.taps.push_back(down.offset * out.row + along.offset * out.pixel);
          pass.rows.push_back(down.kernel * layer.kernel[1] + along.kernel);
        }
      }
      if (lanes > 0 && adjacent(layer, 0) && adjacent(layer, 1)) {
        plan_tiles({{(in.height - 1 - ry) / layer.stride[0] + 1,
                     (in.width - 1 - rx) / layer.stride[1] + 1},
                    {static_cast<int32_t>(downs.size()), static_cast<int32_t>(alongs.size())},
                    {1, 1}, {static_cast<int32_t>(out.row), static_cast<int32_t>(out.pixel)}},
                   lanes, pass);
      }
      passes.push_back(std::move(pass));
    }
  }
  return passes;
}

// The convolution whose input gradient a transposed one computes from images of this size.
ConvLayer convolution_of(const ConvLayer& layer, const ConvBuffer& in) {
  ConvLayer convolution = layer;
  convolution.kind = LayerKind::kConv;
  std::swap(convolution.in, convolution.out);
  convolution.height = in.height, convolution.width = in.width;
  return convolution;
}

// Sets the steps of each tap. Merges runs of taps that are adjacent in memory into one tap each, if
// all runs have one length and no chains lie between pixels.
void plan_steps(const ConvBuffer& in, int step, ConvPass& pass) {
  const int channels = static_cast<int>(round_up(pass.in, step));
  pass.steps = channels / step;
  if (in.chain <= in.pixel) return;
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

MixPass plan_mix(const std::vector<PixelLink>& links, const ConvBuffer& in, const ConvBuffer& out) {
  MixPass pass;
  size_t next = 0;
  for (int pixel = 0; pixel < out.height * out.width; ++pixel) {
    pass.to.push_back(out.at(pixel / out.width, pixel % out.width));
    pass.begin.push_back(pass.from.size());
    for (; next < links.size() && links[next].out == pixel; ++next) {
      pass.from.push_back(in.at(links[next].in / in.width, links[next].in % in.width));
      pass.factors.push_back(links[next].factor);
    }
  }
  pass.begin.push_back(pass.from.size());
  return pass;
}

std::vector<PixelLink> reversed(std::vector<PixelLink> links) {
  for (PixelLink& link : links) std::swap(link.out, link.in);
  std::stable_sort(links.begin(), links.end(),
                   [](const PixelLink& a, const PixelLink& b) { return a.out < b.out; });
  return links;
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

// The stride of pixels of whole vectors. Pixels that are a power of two apart would share a few sets
// of the first-level cache.
int64_t padded(int64_t channels, int lanes) {
  const int64_t pixel = round_up(channels, lanes);
  return pixel % 256 == 0 ? pixel + lanes : pixel;
}

// The channels that are multiplied at a time.
int step_of(Operands operands) { return operands == Operands::kFloat32 ? 1 : 2; }

// Chooses the strides and the size of a buffer.
void place_pixels(const ConvNet& net, bool direct, ConvBuffer& buffer) {
  const int lanes = net.kernels->lanes, step = step_of(net.operands);
  const bool tiled = net.kernels->tiles && !direct;
  // No vector is written to a state that one convolution reads, a number or pair at a time.
  buffer.stored = direct  ? round_up(buffer.channels, step)
                  : tiled ? tiled_channels(buffer.channels)
                          : padded(buffer.channels, lanes);
  buffer.pixel = tiled ? tiled_pixel(buffer.stored, net.chunk) : buffer.stored;
  buffer.row = buffer.pixel * (buffer.left + buffer.width + buffer.right);
  buffer.size = buffer.row * (buffer.top + buffer.height + buffer.bottom);
  if (tiled) buffer.size = (buffer.size + net.chunk - 1) / net.chunk;
  buffer.size = round_up(buffer.size, lanes * step);
  // The rows of tiles are the chains of a pixel, which are next to each other.
  buffer.chain = tiled ? buffer.stored : buffer.size;
}

// Chooses where the values, slopes and gradients of every buffer are.
void place_buffers(ConvNet& net, const std::vector<int>& parts) {
  const int lanes = net.kernels->lanes, of_word = net.operands == Operands::kBFloat16 ? 2 : 1;
  for (size_t v = 0; v < net.buffers.size(); ++v) {
    ConvBuffer& buffer = net.buffers[v];
    place_pixels(net, v == 0 && net.direct, buffer);
    const auto reserve = [&](int64_t size) { return (net.workspace += size) - size; };
    const auto take = [&] { return reserve(buffer.size); };
    buffer.values = buffer.grads = take();
    bool kept = false;
    for (const ConvLayer& layer : net.layers) {
      const bool reads = layer.inputs[0] == int(v) || layer.inputs[1] == int(v);
      kept = kept || (reads && rereads(layer.kind));
    }
    if (v > 0) {
      const Activation activation = net.layers[v - 1].activation;
      if (is_smooth(activation)) buffer.slopes = take();
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
  packed += (tiles.used() ? tiles.products() : int64_t(pass.taps.size())) * pass.steps *
            pass.matrix.planes * round_up(pass.out, kernels.lanes);
  if (!tiles.used()) return 0;
  return tiles.products() * tiles.block * (tiles.row + kernels.vectors * kernels.lanes);
}

}  // namespace

Convolution plan_convolution(const ConvLayer& layer, int height, int width, bool gradient) {
  const ConvKernels& kernels = conv_kernels(Operands::kFloat32);
  Convolution conv{&kernels, layer, gradient};
  ConvBuffer in{height, width, layer.in}, out{layer.height, layer.width, layer.out};
  frame(layer, in, out);
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

ConvNet plan_convnet(std::vector<ConvLayer> layers, int channels, int height, int width,
                     const std::vector<int32_t>& heads, Operands operands, int64_t chunk) {
  const ConvKernels& kernels = conv_kernels(operands);
  const bool split = kernels.tiles && operands == Operands::kSplitBFloat16;
  if (!split && operands != Operands::kBFloat16) operands = Operands::kFloat32;
  const int lanes = kernels.lanes, step = step_of(operands);
  ConvNet net{&kernels, operands, chunk, std::move(layers), {{height, width, channels}},
              std::vector<LayerPlan>(), {}};
  net.plans.resize(net.layers.size());
  for (const ConvLayer& layer : net.layers) {
    net.buffers.push_back({layer.height, layer.width, layer.out});
  }
  int readers = 0;
  for (size_t k = 0; k < net.layers.size(); ++k) {
    const ConvLayer& layer = net.layers[k];
    if (layer.kind == LayerKind::kConv) {
      frame(layer, net.buffers[layer.inputs[0]], net.buffers[k + 1]);
    } else if (layer.kind == LayerKind::kTransposed) {
      ConvBuffer& in = net.buffers[layer.inputs[0]];
      frame(convolution_of(layer, in), net.buffers[k + 1], in);
    }
    readers += (layer.inputs[0] == 0) + (layer.inputs[1] == 0);
  }
  for (const int32_t value : heads) {
    net.heads.push_back({value});
    readers += value == 0;
  }
  net.direct = readers == 1 && net.layers.front().kind == LayerKind::kConv;
  place_buffers(net, plan_arrivals(net));
  for (ConvHead& head : net.heads) {
    const ConvBuffer& buffer = net.buffers[head.value];
    head.begin = net.head_values;
    net.head_values += int64_t{buffer.height} * buffer.width * buffer.stored;
  }
  int64_t tiled_numbers = 0;
  const auto place = [&](ConvPass& pass, const ConvBuffer& from, const ConvBuffer& to) {
    if (!pass.tiles.used()) plan_steps(from, step, pass);
    if (kernels.tiles) plan_matrix(from, to, chunk, pass);
    if (split) pass.matrix.planes = 2;
    tiled_numbers = std::max(tiled_numbers, place_pass(kernels, pass, net.packed));
  };
  for (size_t k = 0; k < net.layers.size(); ++k) {
    const ConvLayer& layer = net.layers[k];
    LayerPlan& plan = net.plans[k];
    const ConvBuffer &in = net.buffers[std::max(layer.inputs[0], 0)], &out = net.buffers[k + 1];
    const int tiled = operands == Operands::kFloat32 ? lanes : 0;
    if (layer.kind == LayerKind::kConv) {
      const bool direct = k == 0 && net.direct;
      // Transforms read whole vectors of channels, which the state may not have.
      plan.forward = {plan_forward(layer, in, out, direct ? 0 : tiled)};
      plan.backward = plan_backward(layer, in, out, direct ? 0 : tiled);
      if (direct && !kernels.tiles) plan_spread(layer, out, lanes, plan.backward, net.spread);
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
  if (split) {
    // The planes of one buffer.
    for (const ConvBuffer& buffer : net.buffers) {
      tiled_numbers = std::max(tiled_numbers, chunk * buffer.size);
    }
  }
  net.scratch = (net.spread.values + tiled_numbers) * sizeof(float);
  return net;
}

}  // namespace cpu
}  // namespace fastlangevin
