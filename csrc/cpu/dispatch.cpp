// The active instruction set: the best that this processor runs, or the one that was chosen.
#include <atomic>
#include <cstring>

#include "cpu/convnet.h"
#include "cpu/step.h"
#include "cpu/tile_permission.h"

namespace fastlangevin {
namespace cpu {
namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  const ConvKernels *conv_float32, *conv_bfloat16;
  bool (*runs_here)();
  bool asks_for_tiles = false;
};

#ifdef FASTLANGEVIN_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") != 0;
}
#endif

#ifdef FASTLANGEVIN_AVX512_BF16
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16") != 0; }
#endif

// From best to worst.
const InstructionSet kInstructionSets[] = {
#ifdef FASTLANGEVIN_AMX
    {"amx", &kAvx512, &kConvAvx512Bf16, &kConvAmx, [] { return has_avx512_bf16() && has_tiles(); },
     true},
#endif
#ifdef FASTLANGEVIN_AVX512_BF16
    {"avx512_bf16", &kAvx512, &kConvAvx512Bf16, &kConvAvx512Bf16, has_avx512_bf16},
#endif
#ifdef FASTLANGEVIN_AVX512
    {"avx512", &kAvx512, &kConvAvx512, &kConvAvx512, has_avx512},
#endif
#ifdef FASTLANGEVIN_X86
    {"avx2", &kAvx2, &kConvAvx2, &kConvAvx2,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c") != 0;
     }},
#endif
    {"baseline", &kBaseline, &kConvBaseline, &kConvBaseline, [] { return true; }},
    // For tests: behind one that runs everywhere, and therefore never the best.
    {"amx_emulated", &kBaseline, &kConvBaseline, &kConvAmxEmulated, [] { return true; }},
};

const InstructionSet* best(bool tiles) {
  for (const InstructionSet& set : kInstructionSets) {
    if (set.runs_here() && (tiles || !set.asks_for_tiles)) return &set;
  }
  return nullptr;
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set{best(true)};
  return set;
}

}  // namespace

const Kernels& step_kernels() { return *chosen().load()->kernels; }

const ConvKernels& conv_kernels(Operands operands) {
  const InstructionSet* set = chosen().load();
  if (operands == Operands::kFloat32) return *set->conv_float32;
  if (set->asks_for_tiles && why_no_tiles() != nullptr) chosen().store(set = best(false));
  const bool split = operands != Operands::kBFloat16;
  return split && !set->conv_bfloat16->tiles ? *set->conv_float32 : *set->conv_bfloat16;
}

bool bfloat16_is_faster() {
  const ConvKernels& kernels = conv_kernels(Operands::kBFloat16);
  if (kernels.tiles) return true;
#ifdef FASTLANGEVIN_AVX512_BF16
  // One vdpbf16ps has the products of two multiply-adds. AMD's processors start as many of them in
  // a cycle as multiply-adds, Intel's half as many.
  if (&kernels == &kConvAvx512Bf16) return __builtin_cpu_is("amd") != 0;
#endif
  return false;
}

const char* instruction_set() { return chosen().load()->name; }

const char* instruction_set(const ConvKernels& kernels) {
  // Only kernels for bfloat16 belong to one set: AMX shares those for float32 with AVX-512.
  for (const InstructionSet& set : kInstructionSets) {
    if (set.conv_bfloat16 == &kernels) return set.name;
  }
  return "";
}

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
