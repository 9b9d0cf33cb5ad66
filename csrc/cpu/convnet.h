// Energies and input gradients of networks on the CPU: the entry points, and the interface that
// every instruction set implements.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/convnet_plan.h"
#include "cpu/parallel.h"

namespace fastlangevin {
namespace cpu {

struct ConvKernels {
  int lanes;    // of a vector; channels are padded to whole vectors
  int vectors;  // how many vectors of output channels are computed together
  bool tiles;   // whether a matrix unit computes the products, and does not multiply float32
  // For values in float32 and in bfloat16.
  using Score = void(const ConvNet& net, const ConvBatch& batch, int64_t first_chain,
                     int64_t last_chain, void* workspace);
  Score *score, *score_bfloat16;
  // Convolves chains [first, last). `memory`, all zero, holds the frames of a chunk of chains and
  // then conv.scratch numbers.
  void (*convolve)(const Convolution& conv, const ConvolutionBatch& batch, int64_t first,
                   int64_t last, int64_t chunk, float* memory);
};

extern const ConvKernels kConvBaseline, kConvAmxEmulated;
#ifdef FASTLANGEVIN_X86
extern const ConvKernels kConvAvx2;
extern const ConvKernels kConvAvx512;
extern const ConvKernels kConvAvx512Bf16;
#ifdef FASTLANGEVIN_AMX
extern const ConvKernels kConvAmx;
#endif
#endif

// The kernels of the active instruction set for some operands; those for float32 also where a
// matrix unit would be needed and there is none. The first call that needs one, on a processor with
// AMX, asks the system for permission to use it, and changes to another instruction set if it is
// refused.
const ConvKernels& conv_kernels(Operands operands);

// Whether the active instruction set computes more products of bfloat16 numbers in a cycle than of
// float32 numbers. This depends on the processor and on the permission to use its matrix unit.
bool bfloat16_is_faster();

// The name of the instruction set that kernels are compiled for.
const char* instruction_set(const ConvKernels& kernels);

// Plans a network on states [channels, height, width]. The layers are in the order of evaluation,
// and the energy is a linear function of the values `heads`. If the kernels have tiles, `chunk` is
// that of every batch; otherwise the plan does not depend on it.
ConvNet plan_convnet(std::vector<ConvLayer> layers, int channels, int height, int width,
                     const std::vector<int32_t>& heads, Operands operands, int64_t chunk);

// The same with this number of leading layers, for kernels with tiles. No number depends on it.
ConvNet plan_leading(std::vector<ConvLayer> layers, int channels, int height, int width,
                     const std::vector<int32_t>& heads, Operands operands, int64_t chunk,
                     size_t leading);

// Plans a convolution that reads images of this size or, if it is a gradient, writes them. What it
// writes has whole vectors of channels.
Convolution plan_convolution(const ConvLayer& layer, int height, int width, bool gradient);

// Packs contiguous weights [out, in, kh, kw] into conv.packed words.
void pack_convolution(const Convolution& conv, const float* weights, float* packed, int threads);

// Computes a convolution of all chains.
void convolve(const Convolution& conv, const ConvolutionBatch& batch, int64_t chains, int threads);

// The parameters of a layer: contiguous weights [out, in, kh, kw] of kConv or [out] of kPointwise
// and kNorm, a bias [out], or null, and the settings of the activation.
struct LayerWeights {
  const float *weights, *bias;
  std::array<float, 2> settings;
};

// Packs the parameters of all layers into net.packed words.
void pack_weights(const ConvNet& net, const std::vector<LayerWeights>& weights, float* packed,
                  int threads);

// The kernel for a network's dtype.
inline ConvKernels::Score* score_kernel(const ConvNet& net) {
  return net.operands == Operands::kBFloat16 ? net.kernels->score_bfloat16 : net.kernels->score;
}

// Divides the chains of a batch over threads. Calls run(thread, first, last, workspace) for the
// share of each, with a workspace of its own.
template <class Run>
void each_share(const ConvNet& net, const ConvBatch& batch, void* workspace, int threads,
                const Run& run) {
  const int64_t team = std::min<int64_t>(threads, batch.chains);
  parallel_for(team, static_cast<int>(team), [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      run(k, batch.chains * k / team, batch.chains * (k + 1) / team,
          static_cast<char*>(workspace) + k * (net.workspace * batch.chunk + net.scratch));
    }
  });
}

// workspace has net.workspace * batch.chunk + net.scratch bytes for each thread, all zero before
// the first use.
void convnet_score(const ConvNet& net, const ConvBatch& batch, void* workspace, int threads);

}  // namespace cpu
}  // namespace fastlangevin
