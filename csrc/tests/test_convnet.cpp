// Input gradients of conv nets against plain loops in double, with buffers of exact size.
#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "cpu/convnet.h"
#include "cpu/step.h"

using namespace fastlangevin;

namespace {

// Pseudorandom numbers in [-0.5, 0.5).
struct Numbers {
  uint32_t state = 1;
  float next() {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) * 0x1p-24f - 0.5f;
  }
  std::vector<float> take(size_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = next();
    return values;
  }
};

using Values = std::vector<double>;  // [channels, height, width]

int area(const ConvLayer& layer) { return layer.height * layer.width; }

struct Case {
  int channels, height, width;
  std::vector<ConvLayer> layers;
  std::vector<int32_t> heads;
  bool shares_constants = false;  // all chains have those of the first
};

// A case in double: values and their gradients, layer by layer.
struct Exact {
  const Case& test;
  const std::vector<std::vector<float>>& weights;
  const std::vector<std::vector<float>>& biases;
  double leak;
  std::vector<Values> constants;  // of every layer
  std::vector<Values> values{}, grads{};

  int height(int v) const { return v ? test.layers[v - 1].height : test.height; }
  int width(int v) const { return v ? test.layers[v - 1].width : test.width; }

  // Calls f(input index, output index, weight index) for every product of a convolution that reads
  // images of this size.
  template <class F>
  void each_product(const ConvLayer& layer, int tall, int wide, const F& f) const {
    for (int o = 0; o < layer.out; ++o)
      for (int y = 0; y < layer.height; ++y)
        for (int x = 0; x < layer.width; ++x)
          for (int i = 0; i < layer.in; ++i)
            for (int ky = 0; ky < layer.kernel[0]; ++ky)
              for (int kx = 0; kx < layer.kernel[1]; ++kx) {
                const int row = y * layer.stride[0] - layer.padding[0] + ky * layer.dilation[0];
                const int column = x * layer.stride[1] - layer.padding[1] + kx * layer.dilation[1];
                if (row < 0 || row >= tall || column < 0 || column >= wide) continue;
                f((i * tall + row) * wide + column, o * area(layer) + y * layer.width + x,
                  ((o * layer.in + i) * layer.kernel[0] + ky) * layer.kernel[1] + kx);
              }
  }

  // The element of the second input that belongs to an element of the result.
  int second(const ConvLayer& layer, int e) const {
    return int(values[layer.inputs[1]].size()) == layer.out ? e / area(layer) : e;
  }

  // For layers that are linear in each input, calls f(which input, input, output, factor).
  template <class F>
  void each_factor(size_t k, const F& f) const {
    const ConvLayer& layer = test.layers[k];
    if (layer.kind == LayerKind::kConstant) return;
    const int size = layer.out * area(layer), read = int(values[layer.inputs[0]].size());
    const int tall = height(layer.inputs[0]), wide = width(layer.inputs[0]);
    if (layer.kind == LayerKind::kConv) {
      each_product(layer, tall, wide,
                   [&](int i, int o, int w) { f(0, i, o, double(weights[k][w])); });
    } else if (layer.kind == LayerKind::kTransposed) {
      ConvLayer convolution = layer;
      std::swap(convolution.in, convolution.out);
      convolution.height = tall, convolution.width = wide;
      each_product(convolution, layer.height, layer.width,
                   [&](int i, int o, int w) { f(0, o, i, double(weights[k][w])); });
    } else if (layer.kind == LayerKind::kPointwise) {
      for (int e = 0; e < size; ++e) {
        f(0, e, e, double(weights[k][e / area(layer)]));
        if (layer.inputs[1] >= 0) f(1, second(layer, e), e, double(layer.factors[1]));
      }
    } else if (layer.kind == LayerKind::kMultiply) {
      for (int e = 0; e < size; ++e) f(0, e, e, values[layer.inputs[1]][second(layer, e)]);
    } else if (layer.kind == LayerKind::kMix) {
      for (int c = 0; c < layer.out; ++c)
        for (const PixelLink& link : layer.links)
          f(0, c * (read / layer.out) + link.in, c * area(layer) + link.out, double(link.factor));
    } else if (layer.kind == LayerKind::kMaxPool) {
      const Values& from = values[layer.inputs[0]];
      for (int e = 0; e < size; ++e) {
        int best = -1;
        for (const PixelLink& link : layer.links) {
          const int i = e / area(layer) * (read / layer.out) + link.in;
          if (link.out == e % area(layer) && (best < 0 || from[i] > from[best])) best = i;
        }
        f(0, best, e, 1.0);
      }
    }
  }

  // Calls f(first element, elements, mean, 1 / deviation) for every group of a norm.
  template <class F>
  void each_group(const ConvLayer& layer, const F& f) const {
    const Values& from = values[layer.inputs[0]];
    const int count = int(from.size()) / layer.groups;
    for (int first = 0; first < int(from.size()); first += count) {
      double mean = 0, variance = 0;
      for (int e = first; e < first + count; ++e) mean += from[e] / count;
      for (int e = first; e < first + count; ++e) variance += std::pow(from[e] - mean, 2) / count;
      f(first, count, mean, 1 / std::sqrt(variance + layer.factors[0]));
    }
  }

  void forward() {
    for (size_t k = 0; k < test.layers.size(); ++k) {
      const ConvLayer& layer = test.layers[k];
      if (layer.kind == LayerKind::kConstant) {
        values.push_back(constants[k]);
        continue;
      }
      Values sums(layer.out * area(layer), 0.0);
      if (layer.kind == LayerKind::kLogSumExp) {
        for (double value : values[layer.inputs[0]]) sums[0] += std::exp(value);
        sums[0] = std::log(sums[0]);
      }
      if (layer.kind == LayerKind::kNorm) {
        each_group(layer, [&](int first, int count, double mean, double scale) {
          for (int e = first; e < first + count; ++e)
            sums[e] = (values[layer.inputs[0]][e] - mean) * scale * weights[k][e / area(layer)];
        });
      }
      each_factor(k, [&](int which, int i, int o, double factor) {
        sums[o] += values[layer.inputs[which]][i] * factor;
      });
      for (size_t e = 0; e < sums.size(); ++e) sums[e] += biases[k][e / area(layer)];
      if (layer.activation == Activation::kLeakyReLU) {
        for (double& sum : sums) sum = sum > 0 ? sum : leak * sum;
      }
      values.push_back(sums);
    }
  }

  void backward() {
    for (size_t k = test.layers.size(); k-- > 0;) {
      const ConvLayer& layer = test.layers[k];
      Values& grad = grads[k + 1];
      if (layer.activation == Activation::kLeakyReLU) {
        for (size_t e = 0; e < grad.size(); ++e) grad[e] *= values[k + 1][e] > 0 ? 1 : leak;
      }
      if (layer.kind == LayerKind::kLogSumExp) {
        const double result = values[k + 1][0] - biases[k][0];
        for (size_t e = 0; e < values[layer.inputs[0]].size(); ++e)
          grads[layer.inputs[0]][e] += grad[0] * std::exp(values[layer.inputs[0]][e] - result);
      }
      if (layer.kind == LayerKind::kNorm) {
        const Values& from = values[layer.inputs[0]];
        each_group(layer, [&](int first, int count, double mean, double scale) {
          double sum = 0, slope = 0;
          const auto g = [&](int e) { return grad[e] * weights[k][e / area(layer)]; };
          for (int e = first; e < first + count; ++e)
            sum += g(e) / count, slope += g(e) * (from[e] - mean) * scale / count;
          for (int e = first; e < first + count; ++e)
            grads[layer.inputs[0]][e] += scale * (g(e) - sum - (from[e] - mean) * scale * slope);
        });
      }
      each_factor(k, [&](int which, int i, int o, double factor) {
        grads[layer.inputs[which]][i] += grad[o] * factor;
        if (layer.kind == LayerKind::kMultiply)
          grads[layer.inputs[1]][second(layer, i)] += grad[o] * values[layer.inputs[0]][i];
      });
    }
  }
};

// Calls f(layer, element, place) for every number of a chain's constants.
template <class F>
void each_constant(const ConvNet& net, const F& f) {
  for (size_t k = 0; k < net.layers.size(); ++k) {
    if (net.layers[k].kind != LayerKind::kConstant) continue;
    const int pixels = area(net.layers[k]);
    for (int64_t c = 0; c < net.layers[k].out; ++c)
      for (int64_t p = 0; p < pixels; ++p)
        f(k, c * pixels + p, net.plans[k].numbers + p * net.buffers[k + 1].stored + c);
  }
}

// The constants of one chain, for every layer.
std::vector<Values> unpadded(const ConvNet& net, const float* numbers) {
  std::vector<Values> constants;
  for (const ConvLayer& layer : net.layers) constants.emplace_back(layer.out * area(layer));
  each_constant(net, [&](size_t k, int64_t e, int64_t at) { constants[k][e] = numbers[at]; });
  return constants;
}

struct Result {
  std::vector<float> grad, energies;
  bool operator==(const Result& other) const {
    return grad == other.grad && energies == other.energies;
  }
};

Result check(const Case& test, int threads, int64_t chunk, Operands operands, size_t leading = 0) {
  // Rounded sums cross a kink too often for a comparison, so there are no kinks then.
  const bool rounded = operands == Operands::kBFloat16 || operands == Operands::kBFloat16x3;
  const float leak = rounded ? 1.0f : 0.2f;
  Numbers numbers;
  const int64_t chains = 5, size = test.channels * test.height * test.width;
  std::vector<std::vector<float>> weights, biases;
  std::vector<cpu::LayerWeights> parameters;
  for (const ConvLayer& layer : test.layers) {
    const bool conv = layer.kind == LayerKind::kConv || layer.kind == LayerKind::kTransposed;
    weights.push_back(numbers.take(
        conv ? size_t(layer.out) * layer.in * layer.kernel[0] * layer.kernel[1] : layer.out));
    biases.push_back(weights.size() == 1 ? std::vector<float>(layer.out) : numbers.take(layer.out));
  }
  for (size_t k = 0; k < weights.size(); ++k) {
    parameters.push_back({weights[k].data(), k == 0 ? nullptr : biases[k].data(), {leak, 0.0f}});
  }
  const ConvNet net = cpu::plan_leading(test.layers, test.channels, test.height, test.width,
                                        test.heads, operands, chunk, leading);
  std::vector<float> packed(net.packed);
  cpu::pack_weights(net, parameters, packed.data(), threads);
  std::vector<std::vector<float>> heads;
  std::vector<float> padded(net.head_values, 0.0f);
  for (const ConvHead& at : net.heads) {
    const ConvBuffer& top = net.buffers[at.value];
    const int pixels = top.height * top.width;
    heads.push_back(numbers.take(top.channels * pixels));
    for (int c = 0; c < top.channels; ++c)
      for (int p = 0; p < pixels; ++p)
        padded[at.begin + p * top.stored + c] = heads.back()[c * pixels + p];
  }
  std::vector<float> constants(chains * net.constants, 0.0f);
  for (int64_t n = 0; n < chains; ++n) {
    each_constant(net, [&](size_t, int64_t, int64_t at) {
      constants[n * net.constants + at] = numbers.next();
    });
  }
  const int64_t constants_stride = test.shares_constants ? 0 : net.constants;
  const std::vector<float> x = numbers.take(chains * size);
  Result result{std::vector<float>(chains * size), std::vector<float>(chains)};
  std::vector<float>&grad = result.grad, &energies = result.energies;
  std::vector<char> workspace(threads * (chunk * net.workspace + net.scratch), 0);
  const int64_t plane = int64_t{test.height} * test.width;
  const ConvBatch batch{chains,           chunk,
                        x.data(),         {size, plane, test.width, 1},
                        grad.data(),      {size, plane, test.width, 1},
                        padded.data(),    0.25f,
                        energies.data(),  packed.data(),
                        constants.data(), constants_stride};
  for (int repeat = 0; repeat < 2; ++repeat) {
    cpu::convnet_score(net, batch, workspace.data(), threads);
  }

  const double tolerance = operands == Operands::kBFloat16     ? 0.03
                           : operands == Operands::kBFloat16x3 ? 3e-5
                                                               : 2e-6;
  for (int64_t n = 0; n < chains; ++n) {
    Exact exact{test, weights, biases, leak,
                unpadded(net, constants.data() + n * constants_stride)};
    exact.values.emplace_back(x.begin() + n * size, x.begin() + (n + 1) * size);
    exact.forward();
    for (const Values& values : exact.values) exact.grads.emplace_back(values.size(), 0.0);
    double energy = 0.25, scale = 0.25;
    for (size_t h = 0; h < heads.size(); ++h) {
      const int v = test.heads[h];
      for (size_t e = 0; e < heads[h].size(); ++e) {
        energy += exact.values[v][e] * heads[h][e];
        scale += std::fabs(exact.values[v][e] * heads[h][e]);
        exact.grads[v][e] += heads[h][e];
      }
    }
    CHECK(std::fabs(energies[n] - energy) <= tolerance * scale);
    exact.backward();
    double error = 0, norm = 0;
    for (int e = 0; e < size; ++e) {
      error += std::pow(grad[n * size + e] - exact.grads[0][e], 2);
      norm += std::pow(exact.grads[0][e], 2);
    }
    CHECK(std::sqrt(error) <= tolerance * std::sqrt(norm));
  }
  return result;
}

// How many layers from the first on may run by parts of a chunk.
size_t may_lead(const Case& test) {
  const auto stays = [](const ConvLayer& layer) {
    return layer.kind == LayerKind::kConstant || layer.kind == LayerKind::kMaxPool ||
           layer.kind == LayerKind::kMultiply || layer.kind == LayerKind::kLogSumExp ||
           layer.kind == LayerKind::kNorm;
  };
  return std::find_if(test.layers.begin(), test.layers.end(), stays) - test.layers.begin();
}

// Rows of tiles are chains or pixels: too few, just enough, and more than a batch of 5 has.
void check_tiles(const Case& test, Operands operands) {
  const Result expected = check(test, 1, 1, operands);
  for (int64_t chunk : {2, 3, 5, 16, 17}) {
    CHECK(check(test, chunk % 2 + 1, chunk, operands) == expected);
  }
  // Parts of a chunk: of 3 and 2 chains, of 4 and 1, and parts without chains.
  for (size_t leading = 1; leading <= std::min<size_t>(4, may_lead(test)); ++leading) {
    CHECK(check(test, 1, leading % 2 ? 5 : 17, operands, leading) == expected);
  }
}

// Adds layers to a case. Every function returns the number of the new value.
struct Builder {
  Case test;

  Builder(int channels, int height, int width) : test{channels, height, width, {}, {}} {}

  int channels(int v) const { return v ? test.layers[v - 1].out : test.channels; }
  int height(int v) const { return v ? test.layers[v - 1].height : test.height; }
  int width(int v) const { return v ? test.layers[v - 1].width : test.width; }
  int add(const ConvLayer& layer) {
    test.layers.push_back(layer);
    return static_cast<int>(test.layers.size());
  }
  int windows(LayerKind kind, int v, int out, int height, int width, int kernel, int stride,
              int padding, int dilation) {
    return add({kind,
                {v, -1},
                channels(v),
                out,
                height,
                width,
                Activation::kLeakyReLU,
                {kernel, kernel},
                {stride, stride},
                {padding, padding},
                {dilation, dilation}});
  }
  int conv(int v, int out, int kernel, int stride = 1, int padding = 0, int dilation = 1) {
    const auto size = [&](int inputs) {
      return (inputs + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
    };
    return windows(LayerKind::kConv, v, out, size(height(v)), size(width(v)), kernel, stride,
                   padding, dilation);
  }
  int pairs(LayerKind kind, int a, int b, Activation activation = Activation::kIdentity) {
    return add({kind,
                {a, b},
                channels(a),
                channels(a),
                height(a),
                width(a),
                activation,
                {1, 1},
                {1, 1},
                {0, 0},
                {1, 1},
                {1.0f, -0.5f}});
  }
  // The windows of 2 x 2 pixels overlap, and some of them reach beyond the edge.
  int pool(LayerKind kind, int v) {
    ConvLayer layer{kind,      {v, -1},  channels(v),          channels(v),
                    height(v), width(v), Activation::kIdentity};
    for (int pixel = 0; pixel < height(v) * width(v); ++pixel)
      for (int k = 0; k < 4; ++k) {
        const int y = pixel / width(v) + k / 2, x = pixel % width(v) + k % 2;
        const float factor = kind == LayerKind::kMix ? 0.25f : static_cast<float>(k);
        if (y < height(v) && x < width(v)) layer.links.push_back({pixel, y * width(v) + x, factor});
      }
    return add(layer);
  }
  int transposed(int v, int out, int kernel, int stride, int padding) {
    const auto size = [&](int inputs) { return (inputs - 1) * stride - 2 * padding + kernel; };
    return windows(LayerKind::kTransposed, v, out, size(height(v)), size(width(v)), kernel, stride,
                   padding, 1);
  }
  int constant(int channels, int height, int width) {
    return add(
        {LayerKind::kConstant, {-1, -1}, channels, channels, height, width, Activation::kIdentity});
  }
  int log_sum_exp(int v) {
    return add({LayerKind::kLogSumExp, {v, -1}, channels(v), 1, 1, 1, Activation::kIdentity});
  }
  Case energy(std::vector<int32_t> heads) {
    test.heads = std::move(heads);
    return test;
  }
};

Case stack(Builder b, const std::vector<std::vector<int>>& layers) {
  int v = 0;
  for (const auto& l : layers) v = b.conv(v, l[0], l[1], l[2], l[3], l.size() > 4 ? l[4] : 1);
  return b.energy({v});
}

// The state and an activation are read twice, and so is a value before its activation.
Case residual() {
  Builder b(3, 6, 5);
  const int a = b.conv(0, 9, 3, 1, 1), shortcut = b.conv(0, 9, 1);
  const int sum = b.pairs(LayerKind::kPointwise, b.conv(a, 9, 3, 1, 1), shortcut);
  const int active = b.pairs(LayerKind::kPointwise, sum, -1, Activation::kLeakyReLU);
  const int half = b.conv(active, 9, 4, 2, 1), other = b.conv(sum, 9, 2, 2);
  return b.energy({b.pairs(LayerKind::kPointwise, half, other, Activation::kLeakyReLU), a, 0});
}

Case pools(LayerKind kind) {
  Builder b(5, 4, 7);
  const int a = b.pool(kind, b.conv(b.pool(kind, 0), 9, 3, 1, 1));
  const int square = b.pairs(LayerKind::kMultiply, a, a);
  return b.energy({b.log_sum_exp(square), b.pairs(LayerKind::kMultiply, square, a)});
}

// The energy contains a constant itself, and constants of one pixel and of all.
Case constants() {
  Builder b(3, 5, 4);
  const int a = b.conv(0, 9, 3, 1, 1), one = b.constant(9, 1, 1), all = b.constant(9, 5, 4);
  const int scaled = b.pairs(LayerKind::kMultiply, a, one, Activation::kLeakyReLU);
  const int shifted = b.pairs(LayerKind::kPointwise, scaled, all, Activation::kLeakyReLU);
  const int sum = b.pairs(LayerKind::kPointwise, shifted, one);
  return b.energy({b.pairs(LayerKind::kMultiply, sum, all), one});
}

Case shared_constants() {
  Case test = constants();
  test.shares_constants = true;
  return test;
}

Case decoder() {
  Builder b(17, 1, 1);
  const int a = b.transposed(b.transposed(0, 9, 3, 1, 0), 18, 4, 2, 1);
  const int gaps = b.transposed(a, 3, 2, 3, 0), same = b.transposed(a, 18, 3, 1, 1);
  return b.energy({gaps, b.conv(same, 5, 3, 1, 1)});
}

Case norms() {
  Builder b(4, 3, 5);
  ConvLayer norm{LayerKind::kNorm,      {b.conv(0, 18, 3, 1, 1), -1}, 18, 18, 3, 5,
                 Activation::kLeakyReLU};
  norm.factors[0] = 0.1f, norm.groups = 3;
  const int a = b.add(norm);
  norm.inputs[0] = b.conv(a, 18, 1), norm.groups = 1;
  return b.energy({b.add(norm), a});
}

}  // namespace

int main() {
  const std::vector<Case> cases{
      stack({3, 8, 8}, {{9, 3, 1, 1}, {17, 4, 2, 1}, {33, 4, 2, 1}}),
      stack({1, 1, 1}, {{1, 1, 1, 0}}),
      stack({2, 7, 11}, {{5, 2, 3, 1}, {40, 3, 1, 2, 2}}),
      stack({2, 6, 5}, {{260, 1, 1, 0}, {3, 5, 2, 4}}),
      stack({2, 1, 1}, {{40, 1, 1, 0}, {1, 1, 1, 0}}),
      stack({3, 4, 4}, {{9, 3, 1, 1}, {17, 4, 1, 0}, {3, 1, 1, 0}}),
      stack({2, 4, 6}, {{9, 5, 1, 2}, {20, 3, 3, 1}}),  // columns in groups of three
      stack({20, 4, 4}, {{9, 4, 3, 1}}),  // a single output, which does not read every pixel
      residual(),
      constants(),
      shared_constants(),
      decoder(),
      norms(),
      pools(LayerKind::kMix),
      pools(LayerKind::kMaxPool),
  };
  for (const char* name : {"amx_emulated", "amx"}) {
    if (!cpu::choose_instruction_set(name)) continue;
    for (const Case& test : cases) {
      check_tiles(test, Operands::kBFloat16x6);
      // Rounded values often have another maximum, whose gradient goes elsewhere.
      if (test.layers.front().kind == LayerKind::kMaxPool) continue;
      check_tiles(test, Operands::kBFloat16), check_tiles(test, Operands::kBFloat16x3);
    }
  }
  for (const char* name : {"baseline", "avx2", "avx512", "avx512_bf16"}) {
    if (!cpu::choose_instruction_set(name)) continue;
    for (const Case& test : cases) {
      check(test, 1, 1, Operands::kFloat32);
      check(test, 1, 8, Operands::kFloat32);
      check(test, 3, 2, Operands::kFloat32);
      const bool maximum = test.layers.front().kind == LayerKind::kMaxPool;
      if (!maximum) check(test, 3, 2, Operands::kBFloat16);
    }
  }
}
