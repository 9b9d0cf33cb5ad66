// The active instruction set: the best that this processor runs, or the one that was chosen.
#include <atomic>
#include <cstring>

#include "cpu/convnet.h"
#include "cpu/step.h"

namespace fastlangevin {
namespace cpu {
namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  const ConvKernels* conv_kernels;
  bool (*runs_here)();
};

#ifdef FASTLANGEVIN_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") != 0;
}
#endif

// From best to worst.
const InstructionSet kInstructionSets[] = {
#ifdef FASTLANGEVIN_X86
    {"avx512_bf16", &kAvx512, &kConvAvx512Bf16,
     [] { return has_avx512() && __builtin_cpu_supports("avx512bf16") != 0; }},
    {"avx512", &kAvx512, &kConvAvx512, has_avx512},
    {"avx2", &kAvx2, &kConvAvx2,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c") != 0;
     }},
#endif
    {"baseline", &kBaseline, &kConvBaseline, [] { return true; }},
};

const InstructionSet* best() {
  for (const InstructionSet& set : kInstructionSets) {
    if (set.runs_here()) return &set;
  }
  return nullptr;
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set{best()};
  return set;
}

}  // namespace

const Kernels& step_kernels() { return *chosen().load()->kernels; }

const ConvKernels& conv_kernels() { return *chosen().load()->conv_kernels; }

const char* instruction_set() { return chosen().load()->name; }

bool choose_instruction_set(const char* name) {
  for (const InstructionSet& set : kInstructionSets) {
    if (std::strcmp(set.name, name) == 0 && set.runs_here()) {
      chosen().store(&set);
      return true;
    }
  }
  return false;
}

}  // namespace cpu
}  // namespace fastlangevin
