// Plans passes by minimal filtering.
#include "cpu/winograd_plan.h"

#include <algorithm>

namespace fastlangevin {
namespace cpu {
namespace {

// Transformed inputs of all tiles of a block, in bytes: they stay in the second-level cache.
constexpr int64_t kBlockBytes = 1 << 16;
constexpr int64_t kTogether = 12;  // a block has whole tiles of registers

// A transform costs about as much as this number of products of vectors, for each number.
constexpr double kTransform = 8;

// G w of F(n, r), for rows of weights and of results that are this number of rows apart.
void transform_axis(int taps, const float (*w)[kTransformed], int step,
                    float (*products)[kTransformed], int apart) {
  for (int k = 0; k < kTransformed; ++k) {
    const float first = w[0][k], last = w[(taps - 1) * step][k];
    products[0][k] = first;
    if (taps == 2) products[apart][k] = first + last;
    if (taps == 3) {
      const float outer = (first + last) * 0.5f, inner = w[step][k] * 0.5f;
      products[apart][k] = outer + inner, products[2 * apart][k] = outer - inner;
    }
    products[taps == 1 ? 0 : taps * apart][k] = last;
  }
}

}  // namespace

void transform_weights(const WinogradTiles& tiles, const PhaseTaps& taps, PhaseProducts& products) {
  const int tall = tiles.taps[0], wide = tiles.outputs[1] + tiles.taps[1] - 1;
  float rows[kMostTaps * (kMostTaps + 1)][kTransformed];
  for (int y = 0; y < tall; ++y) {
    transform_axis(tiles.taps[1], taps + y * tiles.taps[1], 1, rows + y * wide, 1);
  }
  for (int x = 0; x < wide; ++x) {
    transform_axis(tall, rows + x, wide, products + x, wide);
  }
}

void plan_tiles(const PassGrid& grid, int lanes, ConvPass& pass) {
  WinogradTiles tiles;
  int64_t count = 1, pixels = 1, phases = 1, positions = 1;
  for (int axis = 0; axis < 2; ++axis) {
    const int taps = grid.taps[axis];
    if (taps < 1 || taps > kMostTaps) return;
    tiles.taps[axis] = taps;
    tiles.outputs[axis] = tile_outputs(taps);
    tiles.step[axis] = grid.spacing[axis] * grid.stride[axis];
    count *= covered(grid.size[axis], taps) / tiles.outputs[axis];
    pixels *= grid.size[axis];
    phases *= grid.stride[axis], positions *= grid.stride[axis] * taps;
  }
  const auto vectors = [&](int64_t channels) { return double((channels + lanes - 1) / lanes); };
  const double direct = double(pixels * positions * pass.in) * vectors(pass.out);
  const double multiplied = double(count * tiles.products() * phases * pass.in) * vectors(pass.out);
  const double transformed =
      count * tiles.products() * kTransform * (phases * vectors(pass.in) + vectors(pass.out));
  if (multiplied + transformed > direct) return;
  tiles.saving = 1 - (multiplied + transformed) / direct;
  for (int y = 0; y < grid.size[0]; y += tiles.outputs[0]) {
    for (int x = 0; x < grid.size[1]; x += tiles.outputs[1]) {
      tiles.from.push_back(pass.from[y * grid.size[1] + x] + pass.taps.front());
      for (int oy = y; oy < y + tiles.outputs[0]; ++oy) {
        for (int ox = x; ox < x + tiles.outputs[1]; ++ox) {
          const bool inside = oy < grid.size[0] && ox < grid.size[1];
          tiles.to.push_back(inside ? pass.to[oy * grid.size[1] + ox] : -1);
        }
      }
    }
  }
  for (int py = 0; py < grid.stride[0]; ++py) {
    for (int px = 0; px < grid.stride[1]; ++px) {
      tiles.phases.push_back(py * grid.spacing[0] + px * grid.spacing[1]);
      for (int ty = 0; ty < grid.taps[0]; ++ty) {
        for (int tx = 0; tx < grid.taps[1]; ++tx) {
          const int y = py + ty * grid.stride[0], x = px + tx * grid.stride[1];
          tiles.rows.push_back(pass.rows[y * grid.stride[1] * grid.taps[1] + x]);
        }
      }
    }
  }
  pass.steps = phases * pass.in;
  // Whole vectors are written at the channels of each phase.
  const auto rounded = [&](int64_t count) { return (count + lanes - 1) / lanes * lanes; };
  tiles.row = rounded((phases - 1) * pass.in) + rounded(pass.in);
  const int64_t fit = kBlockBytes / (tiles.products() * tiles.row * int64_t{sizeof(float)});
  tiles.block = std::clamp<int64_t>(fit / kTogether * kTogether, kTogether, WinogradTiles::kMost);
  pass.tiles = std::move(tiles);
}

}  // namespace cpu
}  // namespace fastlangevin
