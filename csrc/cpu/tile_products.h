// Passes by tiles of a matrix unit: a row for each output pixel and chain, and a column for each
// output channel.
//
// The numbers of a row depend on the order of its products alone, and this order is that of the
// plan: not on which rows share a tile.
#pragma once

#include "cpu/products.h"
#include "cpu/tiles.h"

namespace fastlangevin {
namespace FASTLANGEVIN_ISA {
namespace {

using Tiles = FASTLANGEVIN_TILES;

struct TiledBFloat16 : BFloat16 {};
struct TiledFloat32 : Float32 {};  // in two or three planes of bfloat16

// The values that passes read. A float32 value is split into bfloat16 numbers whose sum it is. Each
// number is at most 2^-8 of the one before it, and lies in a plane of its own. The planes begin
// `apart` elements after one another.
struct Planes {
  const uint16_t* in;
  int64_t apart;
};

// The planes of values and of weights that are multiplied by each other: the last six for three
// planes, the last three for two, and the last for one. The smallest products of a part of the
// weights come first, so that its large ones do not absorb them. Products of 2^-24 of the largest,
// or of 2^-16 with two planes, are left out. Neighbours that share a plane load its tiles once.
constexpr int kMostProducts = 6;
constexpr int kPlanes[kMostProducts][2] = {{2, 0}, {1, 1}, {0, 2}, {0, 1}, {1, 0}, {0, 0}};
static_assert(plane_products(3) == kMostProducts);

Planes prepare(const Ends<TiledBFloat16>& ends, const ConvBuffer&, int64_t, int64_t, int64_t,
               float*) {
  return {ends.in, 0};
}

// Splits what is next to each other: some chains of a pixel, or all of a chain.
Planes prepare(const Ends<TiledFloat32>& ends, const ConvBuffer& in, int64_t chains, int64_t chunk,
               int64_t planes, float* scratch) {
  uint16_t* halves = reinterpret_cast<uint16_t*>(scratch);
  const int64_t apart = chunk * in.size;
  const bool by_pixel = in.chain <= in.pixel;
  const int64_t count = by_pixel ? chains * in.chain : in.chain;
  const int64_t stride = by_pixel ? in.pixel : in.chain;
  const int64_t pixels = (in.top + in.height + in.bottom) * (in.row / in.pixel);
  for (int64_t block = 0; block < (by_pixel ? pixels : chains); ++block) {
    for (int64_t k = block * stride; k < block * stride + count; k += kLanes) {
      Float rest = Vector::load(ends.in + k);
      for (int64_t plane = 0; plane < planes; ++plane) {
        uint16_t* to = halves + plane * apart + k;
        BFloat16::store(to, rest);
        rest -= BFloat16::load(to);
      }
    }
  }
  return {halves, apart};
}

constexpr int kColumns = kTileBytes / sizeof(float);

// kTileGroup tiles of rows use some parts of the weights at a time, at most kTileParts and 32 KB,
// which stay in the first-level cache. A part has 2 KB in each plane.
constexpr int kTileGroup = 8, kTileParts = 8, kCachedPlanes = 16;

// Calls f(product, new_values, new_weights) for the products of kSplit planes, in order. The last
// two say whether the product before it did not have the same plane.
template <int kSplit, int kProduct = kMostProducts - plane_products(kSplit), class F>
FASTLANGEVIN_INLINE void each_product(const F& f) {
  constexpr bool first = kProduct == kMostProducts - plane_products(kSplit);
  constexpr const int (&before)[2] = kPlanes[first ? kProduct : kProduct - 1];
  f(std::integral_constant<int, kProduct>{},
    std::bool_constant < first || before[0] != kPlanes[kProduct][0] > {},
    std::bool_constant < first || before[1] != kPlanes[kProduct][1] > {});
  if constexpr (kProduct + 1 < kMostProducts) each_product<kSplit, kProduct + 1>(f);
}

// More weights than this do not stay in the second-level cache from one chunk of chains to the
// next.
constexpr int64_t kCachedWeights = 1 << 20;

// Weights to fetch into the second-level cache: `lines` for each part, `ahead` of those in use.
struct Ahead {
  int64_t ahead, lines;
};

// Sets or adds to sums [kM tiles][row][kN * kColumns] the products of some parts. Registers 0 to 3
// hold sums, 4 and 5 values, and 6 and 7 weights.
template <int kM, int kN, int kSplit>
void multiply_parts(Tiles& tiles, const ConvPass& pass, const uint16_t* const* from,
                    const int32_t* const* taps, int64_t apart, int64_t first, int64_t count,
                    const float* w, Ahead next, bool add, float* sums) {
  constexpr int kWidth = kN * kColumns;
  constexpr int64_t kRowBytes = kWidth * sizeof(float);
  const int64_t rows = pass.matrix.rows, stride = pass.matrix.stride * sizeof(uint16_t);
  const auto each_sum = [&](const auto& f) {
    f(std::integral_constant<int, 0>{}, sums);
    if constexpr (kN == 2) f(std::integral_constant<int, 1>{}, sums + kColumns);
    if constexpr (kM == 2) f(std::integral_constant<int, 2>{}, sums + rows * kWidth);
    if constexpr (kM == 2 && kN == 2) {
      f(std::integral_constant<int, 3>{}, sums + rows * kWidth + kColumns);
    }
  };
  each_sum([&](auto tile, const float* at) {
    if (add) return tiles.load<tile>(at, kRowBytes);
    tiles.zero<tile>();
  });
  const int64_t plane = pass.steps * kWidth;
  w += first * kSplit * plane;
  constexpr int64_t kLine = 64 / sizeof(float);
  for (int64_t part = first; part < first + count; ++part, w += kSplit * plane) {
    for (int64_t k = 0; k < next.lines; ++k) {
      __builtin_prefetch(w + next.ahead + k * kLine, 0, 2);
    }
    each_product<kSplit>([&](auto product, auto new_values, auto new_weights) {
      const int64_t at = kPlanes[product][0] * apart;
      const float* weights = w + kPlanes[product][1] * plane;
      if constexpr (new_values) tiles.load<4>(from[0] + taps[0][part] + at, stride);
      if constexpr (new_weights) tiles.load<6>(weights, kRowBytes);
      tiles.multiply_add<0, 4, 6>();
      if constexpr (kN == 2) {
        if constexpr (new_weights) tiles.load<7>(weights + kColumns, kRowBytes);
        tiles.multiply_add<1, 4, 7>();
      }
      if constexpr (kM == 2) {
        if constexpr (new_values) tiles.load<5>(from[1] + taps[1][part] + at, stride);
        tiles.multiply_add<2, 5, 6>();
        if constexpr (kN == 2) tiles.multiply_add<3, 5, 7>();
      }
    });
  }
  each_sum([&](auto tile, float* at) { tiles.store<tile>(at, kRowBytes); });
}

// Passes the results of some tiles to finish, but those of chains that a chunk does not have.
template <int kN>
void finish_tiles(const ConvPass& pass, const int64_t* numbers, int count, int64_t chains,
                  int first, const float* sums, const Finish& finish) {
  constexpr int kWidth = kN * kColumns;
  const int rows = static_cast<int>(pass.matrix.rows);
  int64_t to[kTileRows];
  for (int k = 0; k < count; ++k) {
    const int64_t begin = numbers[k] * rows;
    int done = 0;
    const auto flush = [&](int row) {
      if (done > 0) {
        finish({to, sums + (k * rows + row - done) * kWidth, done, kWidth / kLanes, first});
      }
      done = 0;
    };
    for (int row = 0; row < rows; ++row) {
      const int64_t place = pass.matrix.to[begin + row];
      if (place < 0 || pass.matrix.chain[begin + row] >= chains) {
        flush(row);
      } else {
        to[done++] = place + first;
      }
    }
    flush(rows);
  }
}

// Computes all rows of one block of kN tiles of output channels, from channel `first` on.
template <int kN, int kSplit>
void run_tile_block(Tiles& tiles, const ConvPass& pass, const Planes& planes, int64_t chains,
                    const float* weights, int first, const Finish& finish) {
  constexpr int64_t kParts = std::min(kTileParts, kCachedPlanes / kSplit);
  constexpr int kWidth = kN * kColumns;
  const MatrixTiles& matrix = pass.matrix;
  const int64_t rows = matrix.rows, all = matrix.from.size(), parts = pass.tap_count();
  int64_t numbers[kTileGroup];
  const uint16_t* from[kTileGroup];
  const int32_t* taps[kTileGroup];
  alignas(64) float sums[kTileGroup * kTileRows * kWidth];
  // The first tiles meet weights that are in no cache but the third. Each pair of tiles fetches a
  // share of those that follow.
  const int64_t part_size = kSplit * pass.steps * kWidth, share = part_size / (kTileGroup / 2);
  const bool far = parts * part_size * pass.out / kWidth * sizeof(float) > kCachedWeights;
  for (int64_t next = 0; next < all;) {
    const int64_t lines = far && next == 0 ? share * sizeof(float) / 64 : 0;
    int count = 0;
    for (; next < all && count < kTileGroup; ++next) {
      const int32_t* chain = matrix.chain.data() + next * rows;
      if (*std::min_element(chain, chain + rows) >= chains) continue;
      numbers[count] = next, taps[count] = pass.taps.data() + matrix.taps[next];
      from[count++] = planes.in + matrix.from[next];
    }
    if (parts == 0) std::fill_n(sums, count * rows * kWidth, 0.0f);
    for (int64_t part = 0; part < parts; part += kParts) {
      const int64_t some = std::min(kParts, parts - part);
      for (int k = 0; k < count; k += 2) {
        const auto multiply = [&](auto kM) {
          multiply_parts<kM, kN, kSplit>(tiles, pass, from + k, taps + k, planes.apart, part, some,
                                         weights, {kParts * part_size + k / 2 * share, lines},
                                         part > 0, sums + k * rows * kWidth);
        };
        if (k + 2 <= count) {
          multiply(std::integral_constant<int, 2>{});
        } else {
          multiply(std::integral_constant<int, 1>{});
        }
      }
    }
    finish_tiles<kN>(pass, numbers, count, chains, first, sums, finish);
  }
}

// The form of `run` for values that tiles multiply.
void run(const ConvPass& pass, const Planes& planes, int64_t chains, const float* packed,
         const Finish& finish, float*) {
  TileShapes shapes = {};
  for (int tile = 0; tile < kTileRegisters; ++tile) {
    const bool values = tile == 4 || tile == 5, weights = tile > 5;
    shapes.rows[tile] = static_cast<int>(weights ? pass.steps : pass.matrix.rows);
    shapes.bytes[tile] = values ? static_cast<int>(pass.steps) * 4 : kTileBytes;
  }
  Tiles tiles(shapes);
  const float* weights = packed + pass.weights;
  for (int first = 0; first < pass.out;) {
    const bool wide = pass.out - first > kColumns;
    const int width = wide ? 2 * kColumns : kColumns;
    const auto block = [&](auto kSplit) {
      if (wide) {
        run_tile_block<2, kSplit>(tiles, pass, planes, chains, weights, first, finish);
      } else {
        run_tile_block<1, kSplit>(tiles, pass, planes, chains, weights, first, finish);
      }
    };
    switch (pass.matrix.planes) {
      case 1:
        block(std::integral_constant<int, 1>{});
        break;
      case 2:
        block(std::integral_constant<int, 2>{});
        break;
      default:
        block(std::integral_constant<int, 3>{});
    }
    weights += pass.tap_count() * pass.steps * pass.matrix.planes * width, first += width;
  }
}

}  // namespace
}  // namespace FASTLANGEVIN_ISA
}  // namespace fastlangevin
