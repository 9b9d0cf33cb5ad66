// Input gradients of conv nets on the CPU: the entry points, and the interface that every
// instruction set implements.
#pragma once

#include <vector>

#include "cpu/convnet_plan.h"

namespace fastlangevin {
namespace cpu {

struct ConvKernels {
  int lanes;    // of a vector; channels are padded to whole vectors
  int vectors;  // how many vectors of output channels are computed together
  // For float32 and for bfloat16 values.
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

// The kernels of the active instruction set.
const ConvKernels& conv_kernels();

ConvNet plan_convnet(std::vector<ConvLayer> layers, int height, int width, bool bfloat16);

// Packs contiguous weights [out, in, kh, kw] and biases [out] (or null) into net.packed words.
void pack_weights(const ConvNet& net, const std::vector<const float*>& weights,
                  const std::vector<const float*>& biases, float* packed, int threads);

// workspace has net.workspace * batch.chunk + net.scratch bytes for each thread, all zero before
// the first use.
void convnet_score(const ConvNet& net, const ConvBatch& batch, void* workspace, int threads);

}  // namespace cpu
}  // namespace fastlangevin
