// Plans passes by minimal filtering, and transforms their weights.
#pragma once

#include "cpu/convnet_plan.h"

namespace fastlangevin {
namespace cpu {

// The outputs of a tile along an axis, for a number of taps that F(n, r) is known for here.
constexpr int kMostTaps = 3;
constexpr int tile_outputs(int taps) { return taps == 1 ? 1 : 2; }

// The number of pixels that the tiles of an axis cover.
constexpr int covered(int pixels, int taps) {
  const int outputs = taps > kMostTaps ? 1 : tile_outputs(taps);
  return (pixels + outputs - 1) / outputs * outputs;
}

// A pass as a grid of pixels. Along an axis, pixel k reads `taps` inputs `spacing` apart, from
// first + k * spacing * stride on, in each of `stride` phases.
struct PassGrid {
  int32_t size[2];     // pixels
  int32_t taps[2];     // of each phase
  int32_t stride[2];   // phases of each axis
  int32_t spacing[2];  // strides of the buffer that is read
};

// Sets pass.tiles if they take less time than direct products. The pass has its pixels, taps and
// rows, in the order of the grid.
void plan_tiles(const PassGrid& grid, int lanes, ConvPass& pass);

// The weights of one phase, [position of the kernel][output channel], and their transform,
// [product] [output channel]. As many channels as a block has at most are transformed at a time, in
// vectors.
constexpr int kTransformed = 32;
using PhaseTaps = float[kMostTaps * kMostTaps][kTransformed];
using PhaseProducts = float[(kMostTaps + 1) * (kMostTaps + 1)][kTransformed];
void transform_weights(const WinogradTiles& tiles, const PhaseTaps& taps, PhaseProducts& products);

}  // namespace cpu
}  // namespace fastlangevin
