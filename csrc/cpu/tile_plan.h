// Plans passes by tiles of a matrix unit.
#pragma once

#include "cpu/convnet_plan.h"

namespace fastlangevin {
namespace cpu {

// The channels that a buffer stores, so that the rows of tiles do not cross a cache line.
int64_t tiled_channels(int64_t channels);

// The stride between pixels that store the channels of some chains each, next to each other.
int64_t tiled_pixel(int64_t stored, int64_t chains);

// Sets pass.matrix, and divides the words of each tap into parts. The pass has its pixels, taps,
// positions and steps, and a chunk has this number of chains.
void plan_matrix(const ConvBuffer& in, const ConvBuffer& out, int64_t chains, ConvPass& pass);

// An estimate of the cycles that the products of a chain take, by tiles or by vectors, on a
// processor with AMX and AVX-512. It depends on the plan alone.
double product_cycles(const ConvNet& net);

}  // namespace cpu
}  // namespace fastlangevin
