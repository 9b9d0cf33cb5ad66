// Chains in chunks, with buffers of exact size: equal bit for bit to one step after the other, and
// near to chains in double where the energy has constants.
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "check.h"
#include "cpu/chain.h"
#include "cpu/step.h"

using namespace fastlangevin;

namespace {

constexpr int64_t kChains = 7, kElements = 5;
constexpr int64_t kRow[4] = {kElements, 1, 1, 1};

std::vector<float> numbers(size_t count, uint32_t state) {
  std::vector<float> values(count);
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(state >> 8) * 0x1p-24f - 0.5f;
  }
  return values;
}

// Two linear layers on vectors: 5 -> 9 -> 1.
struct Network {
  ConvNet net;
  std::vector<float> packed, head;

  Network() {
    const auto layer = [](int input, int in, int out) {
      return ConvLayer{LayerKind::kConv, {input, -1}, in, out, 1, 1, Activation::kSiLU};
    };
    net = cpu::plan_convnet({layer(0, kElements, 9), layer(1, 9, 1)}, kElements, 1, 1, {2},
                            Operands::kFloat32, 1);
    packed.resize(net.packed);
    head.resize(net.head_values);
    head[0] = 1.0f;
    const std::vector<float> one = numbers(kElements * 9, 1), two = numbers(9, 2);
    cpu::pack_weights(net, {{one.data(), nullptr, {1.0f}}, {two.data(), nullptr, {1.0f}}},
                      packed.data(), 1);
  }
};

// Four steps of every kind: noise alone, along the gradient, a coefficient per chain, noise last.
std::vector<Step> steps_of(float* x, float* grad, const std::vector<float>& coefficients) {
  std::vector<Step> steps(4);
  for (size_t k = 0; k < steps.size(); ++k) {
    Step& step = steps[k];
    step.dims = 2;
    step.shape[0] = kChains, step.shape[1] = kElements;
    step.x.data = x;
    step.grad.data = k == 0 ? nullptr : grad;
    step.x.strides[0] = step.grad.strides[0] = kElements;
    step.x.strides[1] = step.grad.strides[1] = 1;
    step.scale = -0.3f, step.noise_std = 0.05f;
    if (k == 2) step.scales = step.noise_stds = coefficients.data();
    step.clip = 0.7f, step.lo = -0.5f, step.hi = 1.0f;
    step.noise_last = k == 3;
    step.draw = k != 1;
    step.seed = 5, step.step = static_cast<uint32_t>(k), step.first_chain = 40;
  }
  return steps;
}

struct Result {
  std::vector<float> x = numbers(kChains * kElements, 3), energies = std::vector<float>(kChains);
};

// With chunk 0, one step of all chains after the other.
Result run(const Network& network, int64_t chunk, int threads) {
  const bool whole = chunk == 0;
  if (whole) chunk = 2;
  Result result;
  const int64_t rows = whole ? kChains : std::min<int64_t>(kChains, threads * chunk);
  std::vector<float> grad(rows * kElements);
  std::vector<char> workspace(threads * (chunk * network.net.workspace + network.net.scratch), 0);
  const std::vector<float> coefficients = numbers(kChains, 4);
  const std::vector<Step> steps = steps_of(result.x.data(), grad.data(), coefficients);
  const ConvBatch batch{kChains,
                        chunk,
                        result.x.data(),
                        {kRow[0], kRow[1], kRow[2], kRow[3]},
                        grad.data(),
                        {kRow[0], kRow[1], kRow[2], kRow[3]},
                        network.head.data(),
                        0.25f,
                        result.energies.data(),
                        network.packed.data()};
  if (!whole) {
    cpu::convnet_chain(network.net, batch, steps, workspace.data(), threads);
    return result;
  }
  for (const Step& step : steps) {
    if (step.grad.data) cpu::convnet_score(network.net, batch, workspace.data(), threads);
    cpu::langevin_step(step, threads);
  }
  return result;
}

// Chains on vectors whose energy has constants of each chain: <head, W2 (c SiLU(W1 x + b))>.
struct ConstantsCase {
  static constexpr int kHidden = 9, kOut = 3, kSteps = 4;
  std::vector<float> w1 = numbers(kElements * kHidden, 5), b = numbers(kHidden, 6);
  std::vector<float> w2 = numbers(kHidden * kOut, 7), head = numbers(kOut, 8);
  std::vector<float> constants = numbers(kChains * kHidden, 9);
  std::vector<float> x = numbers(kChains * kElements, 10);

  // The last states with an operand type, where all chains have the first one's constants or not.
  std::vector<float> run(Operands operands, int64_t chunk, int threads, bool shared) const {
    const auto layer = [](LayerKind kind, int a, int b, int in, int out, Activation activation) {
      return ConvLayer{kind, {a, b}, in, out, 1, 1, activation};
    };
    const ConvNet net = cpu::plan_convnet(
        {layer(LayerKind::kConstant, -1, -1, kHidden, kHidden, Activation::kIdentity),
         layer(LayerKind::kConv, 0, -1, kElements, kHidden, Activation::kSiLU),
         layer(LayerKind::kMultiply, 2, 1, kHidden, kHidden, Activation::kIdentity),
         layer(LayerKind::kConv, 3, -1, kHidden, kOut, Activation::kIdentity)},
        kElements, 1, 1, {4}, operands, chunk);
    std::vector<float> packed(net.packed), heads(net.head_values);
    std::vector<float> placed(kChains * net.constants);
    std::copy(head.begin(), head.end(), heads.begin());
    for (int64_t n = 0; n < kChains; ++n) {
      std::copy_n(constants.begin() + n * kHidden, kHidden, placed.begin() + n * net.constants);
    }
    const std::array<float, 2> settings{1.0f, 0.0f};
    cpu::pack_weights(net,
                      {{nullptr, nullptr, settings},
                       {w1.data(), b.data(), settings},
                       {nullptr, nullptr, settings},
                       {w2.data(), nullptr, settings}},
                      packed.data(), 1);
    std::vector<float> states = x, grad(std::min(kChains, threads * chunk) * kElements);
    std::vector<char> workspace(threads * (chunk * net.workspace + net.scratch), 0);
    std::vector<Step> steps(kSteps);
    for (Step& step : steps) {
      step.dims = 2;
      step.shape[0] = kChains, step.shape[1] = kElements;
      step.x.data = states.data(), step.grad.data = grad.data();
      step.x.strides[0] = step.grad.strides[0] = kElements;
      step.x.strides[1] = step.grad.strides[1] = 1;
      step.scale = -0.5f;
    }
    const ConvBatch batch{kChains,       chunk,
                          states.data(), {kRow[0], kRow[1], kRow[2], kRow[3]},
                          grad.data(),   {kRow[0], kRow[1], kRow[2], kRow[3]},
                          heads.data(),  0.0f,
                          nullptr,       packed.data(),
                          placed.data(), shared ? 0 : net.constants};
    cpu::convnet_chain(net, batch, steps, workspace.data(), threads);
    return states;
  }

  // The same in double.
  std::vector<double> exact(bool shared) const {
    std::vector<double> states(x.begin(), x.end());
    for (int k = 0; k < kSteps; ++k) {
      for (int64_t n = 0; n < kChains; ++n) {
        double* chain = states.data() + n * kElements;
        double grad[kElements] = {};
        for (int h = 0; h < kHidden; ++h) {
          double z = b[h], outer = 0;
          for (int i = 0; i < kElements; ++i) z += double{w1[h * kElements + i]} * chain[i];
          for (int o = 0; o < kOut; ++o) outer += double{head[o]} * w2[o * kHidden + h];
          outer *= constants[(shared ? 0 : n) * kHidden + h];
          const double s = 1 / (1 + std::exp(-z));
          for (int i = 0; i < kElements; ++i) {
            grad[i] += outer * s * (1 + z * (1 - s)) * w1[h * kElements + i];
          }
        }
        for (int i = 0; i < kElements; ++i) chain[i] -= 0.5 * grad[i];
      }
    }
    return states;
  }
};

void check_constants(Operands operands, double tolerance) {
  const ConstantsCase test;
  for (bool shared : {false, true}) {
    const std::vector<float> result = test.run(operands, 1, 1, shared);
    const std::vector<double> exact = test.exact(shared);
    double error = 0, moved = 0;
    for (size_t e = 0; e < exact.size(); ++e) {
      error += std::pow(result[e] - exact[e], 2), moved += std::pow(exact[e] - test.x[e], 2);
    }
    CHECK(moved > 0.01);
    CHECK(std::sqrt(error) <= tolerance * std::sqrt(moved));
    for (int64_t chunk : {2, 3, 7, 20}) {
      for (int threads : {1, 2}) CHECK(test.run(operands, chunk, threads, shared) == result);
    }
  }
}

}  // namespace

int main() {
  for (const char* name : {"amx_emulated", "amx", "baseline"}) {
    if (!cpu::choose_instruction_set(name)) continue;
    check_constants(Operands::kBFloat16, 0.02), check_constants(Operands::kBFloat16x3, 1e-4);
    check_constants(Operands::kBFloat16x6, 5e-6), check_constants(Operands::kFloat32, 5e-6);
  }
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    if (!cpu::choose_instruction_set(name)) continue;
    const Network network;
    const Result expected = run(network, 0, 1);
    for (int64_t chunk : {1, 2, 3, 7, 20}) {
      for (int threads : {1, 2, 3, 9}) {
        const Result result = run(network, chunk, threads);
        CHECK(result.x == expected.x);
        CHECK(result.energies == expected.energies);
      }
    }
  }
}
