// Chains in chunks, with buffers of exact size: equal bit for bit to one step after the other.
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

}  // namespace

int main() {
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
