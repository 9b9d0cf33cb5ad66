// Input gradients of conv nets against plain loops in double, with buffers of exact size.
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

struct Image {
  int channels, height, width;
  int size() const { return channels * height * width; }
};

Image after(const ConvLayer& layer, const Image& in) {
  const auto size = [&](int axis, int inputs) {
    return (inputs + 2 * layer.padding[axis] - layer.dilation[axis] * (layer.kernel[axis] - 1) - 1) /
               layer.stride[axis] + 1;
  };
  return {layer.out, size(0, in.height), size(1, in.width)};
}

// Calls f(input index, output index, weight index) for every product of a convolution.
template <class F>
void each_product(const ConvLayer& layer, const Image& in, const Image& out, const F& f) {
  for (int o = 0; o < out.channels; ++o)
    for (int y = 0; y < out.height; ++y)
      for (int x = 0; x < out.width; ++x)
        for (int i = 0; i < in.channels; ++i)
          for (int ky = 0; ky < layer.kernel[0]; ++ky)
            for (int kx = 0; kx < layer.kernel[1]; ++kx) {
              const int row = y * layer.stride[0] - layer.padding[0] + ky * layer.dilation[0];
              const int column = x * layer.stride[1] - layer.padding[1] + kx * layer.dilation[1];
              if (row < 0 || row >= in.height || column < 0 || column >= in.width) continue;
              f((i * in.height + row) * in.width + column, (o * out.height + y) * out.width + x,
                ((o * in.channels + i) * layer.kernel[0] + ky) * layer.kernel[1] + kx);
            }
}

struct Case {
  std::vector<ConvLayer> layers;
  int height, width;
};

void check(Case test, int threads, int64_t chunk, bool bfloat16) {
  // Sums that are rounded to 8 bits cross a kink too often for a comparison, so there are no kinks.
  for (ConvLayer& layer : test.layers) layer.settings[0] = bfloat16 ? 1.0f : 0.2f;
  Numbers numbers;
  const int64_t chains = 5;
  std::vector<Image> images{{test.layers[0].in, test.height, test.width}};
  std::vector<std::vector<float>> weights, biases;
  std::vector<const float*> weight_at, bias_at;
  for (const ConvLayer& layer : test.layers) {
    images.push_back(after(layer, images.back()));
    weights.push_back(numbers.take(size_t(layer.out) * layer.in * layer.kernel[0] * layer.kernel[1]));
    biases.push_back(numbers.take(layer.out));
  }
  for (size_t k = 0; k < weights.size(); ++k) {
    weight_at.push_back(weights[k].data());
    bias_at.push_back(k == 0 ? nullptr : biases[k].data());
  }
  const ConvNet net = cpu::plan_convnet(test.layers, test.height, test.width, bfloat16);
  std::vector<float> packed(net.packed);
  cpu::pack_weights(net, weight_at, bias_at, packed.data(), threads);
  const Image& in = images.front();
  const Image& top = images.back();
  const int64_t pixel = net.buffers.back().pixel;
  const std::vector<float> head = numbers.take(top.size());
  std::vector<float> padded(top.height * top.width * pixel, 0.0f);
  for (int c = 0; c < top.channels; ++c)
    for (int p = 0; p < top.height * top.width; ++p)
      padded[p * pixel + c] = head[c * top.height * top.width + p];
  const std::vector<float> x = numbers.take(chains * in.size());
  std::vector<float> grad(chains * in.size()), energies(chains);
  std::vector<char> workspace(threads * (chunk * net.workspace + net.scratch), 0);
  const int64_t plane = int64_t{in.height} * in.width;
  const ConvBatch batch{chains, chunk, x.data(), {in.size(), plane, in.width, 1},
                        grad.data(), {in.size(), plane, in.width, 1}, padded.data(), 0.25f,
                        energies.data(), packed.data()};
  for (int repeat = 0; repeat < 2; ++repeat) {
    cpu::convnet_score(net, batch, workspace.data(), threads);
  }

  const double leak = test.layers[0].settings[0], tolerance = bfloat16 ? 0.02 : 2e-6;
  for (int64_t n = 0; n < chains; ++n) {
    std::vector<Values> values{Values(x.begin() + n * in.size(), x.begin() + (n + 1) * in.size())};
    for (size_t k = 0; k < test.layers.size(); ++k) {
      Values sums(images[k + 1].size(), 0.0);
      const int area = images[k + 1].height * images[k + 1].width;
      for (size_t e = 0; k > 0 && e < sums.size(); ++e) sums[e] = biases[k][e / area];
      each_product(test.layers[k], images[k], images[k + 1],
                   [&](int i, int o, int w) { sums[o] += values[k][i] * weights[k][w]; });
      for (double& sum : sums) sum = sum > 0 ? sum : leak * sum;
      values.push_back(sums);
    }
    double energy = 0.25, scale = 0.25;
    for (int e = 0; e < top.size(); ++e) energy += values.back()[e] * head[e];
    for (int e = 0; e < top.size(); ++e) scale += std::fabs(values.back()[e] * head[e]);
    CHECK(std::fabs(energies[n] - energy) <= tolerance * scale);
    Values gradient(head.begin(), head.end());
    for (size_t k = test.layers.size(); k-- > 0;) {
      for (size_t e = 0; e < gradient.size(); ++e) gradient[e] *= values[k + 1][e] > 0 ? 1 : leak;
      Values before(images[k].size(), 0.0);
      each_product(test.layers[k], images[k], images[k + 1],
                   [&](int i, int o, int w) { before[i] += gradient[o] * weights[k][w]; });
      gradient = before;
    }
    double error = 0, size = 0;
    for (int e = 0; e < in.size(); ++e) {
      error += std::pow(grad[n * in.size() + e] - gradient[e], 2), size += std::pow(gradient[e], 2);
    }
    CHECK(std::sqrt(error) <= tolerance * std::sqrt(size));
  }
}

ConvLayer layer(int in, int out, int kernel, int stride, int padding, int dilation = 1) {
  return {in, out, {kernel, kernel}, {stride, stride}, {padding, padding}, {dilation, dilation},
          Activation::kLeakyReLU, {0.2f, 0.0f}};
}

}  // namespace

int main() {
  const std::vector<Case> cases{
      {{layer(3, 9, 3, 1, 1), layer(9, 17, 4, 2, 1), layer(17, 33, 4, 2, 1)}, 8, 8},
      {{layer(1, 1, 1, 1, 0)}, 1, 1},
      {{layer(2, 5, 2, 3, 1), layer(5, 40, 3, 1, 2, 2)}, 7, 11},
      {{layer(2, 260, 1, 1, 0), layer(260, 3, 5, 2, 4)}, 6, 5},
  };
  for (const char* name : {"baseline", "avx2", "avx512", "avx512_bf16"}) {
    if (!cpu::choose_instruction_set(name)) continue;
    for (const Case& test : cases) {
      check(test, 1, 1, false);
      check(test, 1, 8, false);
      check(test, 3, 2, false);
      check(test, 3, 2, true);
    }
  }
}
