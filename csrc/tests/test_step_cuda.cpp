// The CUDA kernels, run on the host (cuda_shim), give the CPU's bits.
#include "cases.h"
#include "check.h"
#include "step_cpu.h"
#include "step_cuda.h"

using namespace fastlangevin;

int main() {
  CHECK(cuda::reason(0)[0] == '\0');
  each_case([](const Case& c) {
    const auto expected = outcome(c, [](const Step& step) { cpu::langevin_step(step, 1); });
    const auto run = [](const Step& step) { cuda::langevin_step(step, 0, nullptr); };
    CHECK(outcome(c, run) == expected);
    // The seed and the first step from memory.
    const auto replay = [](Step step) {
      const int64_t state[2] = {static_cast<int64_t>(step.seed), 40};
      step.state = state, step.seed = 0, step.step = 1;
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
