// The passes of single layers, between buffers whose strides are known.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/convnet_plan.h"

namespace fastlangevin {
namespace cpu {

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Widens the frames of a convolution's input and output until no pass needs to test for an edge.
// Whole tiles fit too, which may begin inside of an image and end outside.
void widen_frames(const ConvLayer& layer, ConvBuffer& in, ConvBuffer& out);

// The forward pass of a convolution. With lanes > 0 it has Winograd's tiles if they save time.
ConvPass plan_forward(const ConvLayer& layer, const ConvBuffer& in, const ConvBuffer& out,
                      int lanes);

// The passes to the input's gradient of a convolution, one for each residue of the stride.
std::vector<ConvPass> plan_backward(const ConvLayer& layer, const ConvBuffer& in,
                                    const ConvBuffer& out, int lanes);

// Whether the input gradient of a convolution takes fewer products by tiles if 2 x 2 pixels are
// computed as if they were channels of one. Otherwise most columns of a tile would be padding.
bool fits_quads(const ConvLayer& layer, const ConvBuffer& in, int64_t columns);

// That pass. Its taps are the outputs at all distances of quad_reach from the first pixel.
ConvPass plan_quads(const ConvLayer& layer, const ConvBuffer& in, const ConvBuffer& out);

// Along an axis, the distances of the outputs that reach one of two neighbouring pixels from the
// first of these, in the order of memory.
std::vector<int> quad_reach(const ConvLayer& layer, int axis);

// Weights [out, 4 * in, taps] for that pass, of weights [out, in, kernel].
std::vector<float> quad_weights(const ConvLayer& layer, const float* weights);

// Sets the steps of each tap. Merges runs of taps that are adjacent in memory into one tap each, if
// all runs have one length and no chains lie between pixels.
void plan_steps(const ConvBuffer& in, int step, ConvPass& pass);

// Plans the products of a layer's spread gradient if they are fewer than those of its passes. The
// passes then read these products.
void plan_spread(const ConvLayer& layer, const ConvBuffer& out, int lanes,
                 std::vector<ConvPass>& passes, ConvSpread& spread);

// The pass of kMix or kMaxPool along links, which are in the order of their outputs.
MixPass plan_mix(const std::vector<PixelLink>& links, const ConvBuffer& in, const ConvBuffer& out);

// The links of the opposite pass.
std::vector<PixelLink> reversed(std::vector<PixelLink> links);

}  // namespace cpu
}  // namespace fastlangevin
