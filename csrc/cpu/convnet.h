// The conv net's score on the CPU: entry points, and what the instruction sets provide to them.
#pragma once

#include <vector>

#include "cpu/convnet_plan.h"

namespace fastlangevin {
namespace cpu {

struct ConvKernels {
  int lanes;    // of a vector: channels are padded to whole ones
  int vectors;  // as many output channels as fill so many are computed together
  // On float32 and on bfloat16 values.
  using Score = void(const ConvNet& net, const ConvBatch& batch, int64_t first_chain,
                     int64_t last_chain, void* workspace);
  Score *score, *score_bfloat16;
};

extern const ConvKernels kConvBaseline;
#ifdef FASTLANGEVIN_X86
extern const ConvKernels kConvAvx2;
extern const ConvKernels kConvAvx512;
extern const ConvKernels kConvAvx512Bf16;
#endif

// The kernels of the instruction set in use.
const ConvKernels& conv_kernels();

ConvNet plan_convnet(std::vector<ConvLayer> layers, int height, int width, bool bfloat16);

// Weights [out, in, kh, kw] and biases [out] (or null), contiguous, into net.packed words.
void pack_weights(const ConvNet& net, const std::vector<const float*>& weights,
                  const std::vector<const float*>& biases, float* packed, int threads);

// workspace: net.workspace * batch.chunk + net.scratch bytes for each thread, zero before its
// first use.
void convnet_score(const ConvNet& net, const ConvBatch& batch, void* workspace, int threads);

}  // namespace cpu
}  // namespace fastlangevin
