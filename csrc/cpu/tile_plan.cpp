// Plans passes by tiles of a matrix unit.
#include "cpu/tile_plan.h"

#include <algorithm>

#include "cpu/tiles.h"

namespace fastlangevin {
namespace cpu {
namespace {

constexpr int64_t kLine = 64 / sizeof(uint16_t);                 // numbers in a cache line
constexpr int64_t kPairs = kTileBytes / (2 * sizeof(uint16_t));  // in a row of a tile
constexpr int64_t kColumns = kTileBytes / sizeof(float);         // of sums

// A range in as few parts of one size as possible. If they are longer than the range in all, the
// last part begins early.
struct Parts {
  int64_t length, count, size;

  Parts(int64_t length, int64_t most)
      : length(length), count((length + most - 1) / most), size((length + count - 1) / count) {}
  int64_t begin(int64_t part) const { return std::min(part * size, length - size); }
};

// Rows that are a constant stride apart: all those of `pixels` pixels and `chains` chains.
struct Run {
  int64_t pixels, chains, stride;
};

// The pixels of a pass that follow one another at the same distance, and have the same taps.
Run pixel_run(const ConvPass& pass) {
  const int64_t pixels = pass.from.size();
  if (pixels < 2) return {1, 1, 0};
  const int64_t distance = pass.from[1] - pass.from[0];
  const auto follows = [&](int64_t k) {
    return pass.from[k] - pass.from[k - 1] == distance &&
           (pass.residues.empty() || pass.residues[k] == pass.residues[k - 1]);
  };
  int64_t length = 1;
  while (length < pixels && follows(length)) ++length;
  if (pixels % length != 0) return {1, 1, 0};
  for (int64_t k = 0; k < pixels; ++k) {
    if (k % length != 0 && !follows(k)) return {1, 1, 0};
  }
  return {length, 1, distance};
}

// The run that needs the fewest tiles. Of equal ones, the rows of the closest are in few lines.
Run best_run(const ConvBuffer& in, int64_t chains, const ConvPass& pass) {
  const Run pixels = pixel_run(pass);
  std::vector<Run> runs{{1, chains, in.chain}};
  if (pixels.pixels > 1) runs.push_back(pixels);
  if (pixels.stride == chains * in.chain) runs.push_back({pixels.pixels, chains, in.chain});
  const auto tiles = [&](const Run& run) {
    const int64_t length = run.pixels * run.chains;
    return int64_t(pass.from.size()) * chains / length * Parts(length, kTileRows).count;
  };
  return *std::min_element(runs.begin(), runs.end(), [&](const Run& a, const Run& b) {
    const int64_t one = tiles(a), two = tiles(b);
    return one != two ? one < two : a.stride < b.stride;
  });
}

}  // namespace

int64_t tiled_channels(int64_t channels) {
  if (channels <= kColumns) return kColumns;
  const int64_t stored = (channels + kLine - 1) / kLine * kLine;
  // Rows that are a power of two apart would share a few sets of the first-level cache.
  return stored % 256 == 0 ? stored + kLine : stored;
}

int64_t tiled_pixel(int64_t stored, int64_t chains) {
  const int64_t pixel = stored * chains;
  // Rows of several pixels are in one tile only if the chains do not fill tiles by themselves.
  const bool power = (pixel & (pixel - 1)) == 0;
  return power && chains % kTileRows == 0 ? pixel + kLine : pixel;
}

void plan_matrix(const ConvBuffer& in, const ConvBuffer& out, int64_t chains, ConvPass& pass) {
  MatrixTiles& matrix = pass.matrix;
  const Run run = best_run(in, chains, pass);
  const Parts rows(run.pixels * run.chains, kTileRows), words(pass.steps, kPairs);
  matrix.rows = rows.size, matrix.stride = run.stride;
  for (int64_t pixel = 0; pixel < int64_t(pass.from.size()); pixel += run.pixels) {
    for (int64_t chain = 0; chain < chains; chain += run.chains) {
      for (int64_t part = 0; part < rows.count; ++part) {
        for (int64_t row = rows.begin(part); row < rows.begin(part) + rows.size; ++row) {
          const int64_t at = pixel + row / run.chains, n = chain + row % run.chains;
          const bool again = row < part * rows.size;
          if (row == rows.begin(part)) {
            const int64_t residue = pass.residues.empty() ? 0 : pass.residues[at];
            matrix.from.push_back(pass.from[at] + n * in.chain);
            matrix.taps.push_back(residue * pass.tap_count() * words.count);
          }
          matrix.to.push_back(again ? -1 : pass.to[at] + n * out.chain);
          matrix.chain.push_back(static_cast<int32_t>(n));
        }
      }
    }
  }
  matrix.words = pass.steps, matrix.again = words.count * words.size - words.length;
  std::vector<int32_t> taps;
  for (const int32_t tap : pass.taps) {
    for (int64_t part = 0; part < words.count; ++part) {
      taps.push_back(static_cast<int32_t>(tap + 2 * words.begin(part)));
    }
  }
  pass.taps = std::move(taps), pass.steps = words.size;
}

namespace {

// Parts of the processor's highest speed, estimated and not measured by this code. With them, six
// products by tiles take 0.46, 0.39 and 0.38 of the time of vectors for the paper's networks of
// width 16, 32 and 64. The last is for products by vectors that are no Winograd products.
constexpr double kByTiles = 0.8, kByWinograd = 0.45, kByVectors = 0.75;

// Of all tiles of a chunk. A product of full tiles takes 16 cycles, and one with 8 rows 0.64 of
// that.
double tile_cycles(const ConvPass& pass) {
  const MatrixTiles& matrix = pass.matrix;
  const double count = double(matrix.from.size()) * pass.tap_count() *
                       ((pass.out + kColumns - 1) / kColumns) * plane_products(matrix.planes);
  return count * (4 + 0.75 * matrix.rows) / kByTiles;
}

// Of one chain: two multiply-adds of 16 numbers in a cycle.
double vector_cycles(const ConvPass& pass) {
  constexpr int64_t kNumbers = 16;
  const double vectors = (pass.out + kNumbers - 1) / kNumbers;
  const WinogradTiles& tiles = pass.tiles;
  const double products = tiles.used()
                              ? (1 - tiles.saving) * pass.rows.size() * pass.in / kByWinograd
                              : pass.taps.size() * pass.steps / kByVectors;
  return pass.to.size() * products * vectors / 2;
}

}  // namespace

double product_cycles(const ConvNet& net) {
  double cycles = net.spread.pixel > 0 ? vector_cycles(net.spread.products) : 0;
  for (size_t k = 0; k < net.layers.size(); ++k) {
    const LayerPlan& plan = net.plans[k];
    // The last part of a chunk may have fewer chains, and takes as long.
    const int64_t parts = k < net.leading ? (net.chunk + net.part - 1) / net.part : 1;
    const auto add = [&](const std::vector<ConvPass>& passes, int value) {
      if (passes.empty()) return;
      // Splitting a vector of numbers into planes takes some 16 cycles.
      if (net.planes > 1) cycles += net.buffers[value].size;
      for (const ConvPass& pass : passes) {
        cycles +=
            pass.matrix.rows > 0 ? parts * tile_cycles(pass) / net.chunk : vector_cycles(pass);
      }
    };
    add(plan.forward, net.layers[k].inputs[0]);
    if (k > 0 || net.spread.pixel == 0) add(plan.backward, static_cast<int>(k) + 1);
  }
  return cycles;
}

}  // namespace cpu
}  // namespace fastlangevin
