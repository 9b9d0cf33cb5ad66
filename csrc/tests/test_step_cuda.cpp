// The CUDA kernels, run on the host (cuda_shim), give the same bits as the CPU.
#include <stdexcept>
#include <string>

#include "cases.h"
#include "check.h"
#include "cpu/step.h"
#include "cuda/step.h"

using namespace fastlangevin;

// The error of a launch that fails. More blocks than a grid can have are rejected before any runs.
template <class Launch>
std::string failure(Launch&& launch) {
  try {
    launch();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

void errors_name_the_kernel_and_the_sizes() {
  constexpr int64_t kMany = int64_t{1} << 40;
  const std::string sizes =
      " on 1099511627776 chains of 1 elements (4294967296 blocks of 256 threads): "
      "invalid configuration argument";
  float number = 0;
  const Noise noise{77, 3, 5, 11, Fill::kNormal, kMany, 1};
  CHECK(failure([&] { cuda::fill_noise(noise, &number, 0, nullptr); }) ==
        "fastlangevin: CUDA kernel fill" + sizes);
  Step step;
  step.dims = 2, step.shape[0] = kMany, step.shape[1] = 1;
  step.x.data = &number;
  step.noise_std = 1, step.draw = true;
  CHECK(failure([&] { cuda::langevin_step(step, 0, nullptr); }) ==
        "fastlangevin: CUDA kernel linear_step" + sizes);
  CHECK(number == 0);
}

// Zeros of both signs and a NaN with a payload, at bounds of both signs and with each term absent.
void zeros_and_nan_keep_their_bits() {
  const float values[] = {0.0f, -0.0f, Scalar::from_bits(0x7fc00123u), 1.0f, -1.0f};
  constexpr int kValues = 5, kElements = kValues * kValues;
  float x[kElements], terms[kElements];
  for (int k = 0; k < kElements; ++k) x[k] = values[k % kValues], terms[k] = values[k / kValues];
  const float bounds[][2] = {{0.0f, 1.0f}, {-0.0f, 1.0f}, {-1.0f, 0.0f}, {-1.0f, -0.0f}};
  for (int form = 0; form < 8 * 4; ++form) {
    const auto run = [&](auto&& take) {
      std::vector<float> states(x, x + kElements);
      Step step;
      step.dims = 2, step.shape[0] = 1, step.shape[1] = kElements;
      step.positions[1] = step.x.strides[1] = 1;
      step.grad.strides[1] = step.noise.strides[1] = 1;
      step.x.strides[0] = step.grad.strides[0] = step.noise.strides[0] = kElements;
      step.x.data = states.data();
      if (form & 1) step.grad.data = terms;
      if (form & 2) step.noise.data = terms;
      step.noise_last = form & 4;
      step.scale = -1, step.noise_std = 0.5f;
      step.lo = bounds[form / 8][0], step.hi = bounds[form / 8][1];
      take(step);
      std::vector<uint32_t> words;
      for (const float value : states) words.push_back(Scalar::bits(value));
      return words;
    };
    CHECK(run([](const Step& step) { cuda::langevin_step(step, 0, nullptr); }) ==
          run([](const Step& step) { cpu::langevin_step(step, 1); }));
  }
}

int main() {
  errors_name_the_kernel_and_the_sizes();
  zeros_and_nan_keep_their_bits();
  CHECK(cuda::reason(0)[0] == '\0');
  each_case([](const Case& c) {
    const auto expected = outcome(c, [](const Step& step) { cpu::langevin_step(step, 1); });
    const auto run = [](const Step& step) { cuda::langevin_step(step, 0, nullptr); };
    CHECK(outcome(c, run) == expected);
    // The seed and the first step are read from memory.
    const auto replay = [](Step step) {
      const int64_t rng_state[2] = {static_cast<int64_t>(step.seed), 40};
      step.rng_state = rng_state, step.seed = 0, step.step = 1;
      cuda::langevin_step(step, 0, nullptr);
    };
    CHECK(outcome(c, replay) == expected);
  });
  for (const int64_t elements : {1, 3, 4, 5, 1023, 4100}) {
    for (const Fill kind : {Fill::kNormal, Fill::kUniform}) {
      for (const int64_t chains : {1, 3}) {
        const Noise noise{77, 3, 5, 11, kind, chains, elements};
        std::vector<float> ours(static_cast<size_t>(chains * elements)), theirs = ours;
        cuda::fill_noise(noise, ours.data(), 0, nullptr);
        cpu::fill_noise(noise, theirs.data(), 1);
        CHECK(ours == theirs);
      }
    }
  }
}
