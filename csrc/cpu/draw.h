// Draws noise on the CPU, kLanes Philox blocks at a time, with one instruction set.
#pragma once

#include "cpu/simd.h"
#include "cpu/step.h"

namespace fastlangevin {
namespace FASTLANGEVIN_ISA {
namespace {

using cpu::kTile;
using Float = Vector::Float;
using Counter = Vector::Counter;
using Keys = KeySchedule<Vector>;

constexpr int kGroup = 4 * kLanes;  // numbers drawn at a time
static_assert(kTile % kGroup == 0, "a tile holds whole groups");

// The addresses of the blocks of a group, as two vectors for the even and the odd lanes.
struct Blocks {
  Counter block[2], chain[2];
};

// Groups are computed in two passes, and the first stores the words where the numbers will be. Each
// pass is one long chain of dependent operations. The shorter its code is, the more groups a
// processor overlaps (1.2 times faster than a single pass, on Zen 5 with AVX-512).
FASTLANGEVIN_INLINE void draw_words(const Blocks& at, const Noise& noise, const Keys& keys,
                                    float* out) {
  Counter words[2][4];
  for (int half = 0; half < 2; ++half) {
    words[half][0] = at.block[half];
    words[half][1] = at.chain[half];
    words[half][2] = Counter{} + noise.step;
    words[half][3] = Counter{} + noise.stream;
    philox<Vector>(words[half], keys);
  }
  for (int k = 0; k < 4; ++k) {
    const Vector::Word word = interleave(words[0][k], words[1][k]);
    Vector::store(out + k * kLanes, Vector::from_bits(word));
  }
}

FASTLANGEVIN_INLINE void words_to_numbers(Fill fill, float* out) {
  Vector::Word w[4];
  for (int k = 0; k < 4; ++k) w[k] = Vector::bits(Vector::load(out + k * kLanes));
  Float z[4];
  if (fill == Fill::kNormal) {
    box_muller<Vector>(w[0], w[1], z[0], z[1]);
    box_muller<Vector>(w[2], w[3], z[2], z[3]);
  } else {
    for (int k = 0; k < 4; ++k) z[k] = uniform<Vector>(w[k]);
  }
  store_blocks(out, z);
}

FASTLANGEVIN_INLINE void generate(const Blocks& at, const Noise& noise, const Keys& keys,
                                  float* out) {
  draw_words(at, noise, keys, out);
  words_to_numbers(noise.fill, out);
}

FASTLANGEVIN_INLINE Blocks consecutive(uint32_t block, uint32_t chain) {
  Blocks at;
  for (int k = 0; k < kLanes; ++k) at.block[k % 2][k / 2] = lane_block(k);
  for (int half = 0; half < 2; ++half) {
    at.block[half] += block;
    at.chain[half] = Counter{} + chain;
  }
  return at;
}

FASTLANGEVIN_INLINE void copy(float* to, const float* from, int64_t count) {
  for (int64_t k = 0; k < count; ++k) to[k] = from[k];
}

// Draws elements [first, first + count) of one chain.
void draw_span(const Noise& noise, const Keys& keys, uint32_t chain, int64_t first, int64_t count,
               float* out) {
  float group[kGroup];
  const int64_t skip = first % 4;
  int64_t block = first / 4;
  if (skip != 0) {
    generate(consecutive(static_cast<uint32_t>(block), chain), noise, keys, group);
    const int64_t some = count < kGroup - skip ? count : kGroup - skip;
    copy(out, group + skip, some);
    out += some, count -= some, block += kLanes;
  }
  Blocks at = consecutive(static_cast<uint32_t>(block), chain);
  const int64_t whole = count / kGroup * kGroup;
  for (int64_t k = 0; k < whole; k += kGroup) {
    draw_words(at, noise, keys, out + k);
    for (int half = 0; half < 2; ++half) at.block[half] += kLanes;
  }
  for (int64_t k = 0; k < whole; k += kGroup) words_to_numbers(noise.fill, out + k);
  if (whole < count) {
    generate(at, noise, keys, group);
    copy(out + whole, group, count - whole);
  }
}

// Draws all elements of several small chains; the lanes take blocks of different chains. `spare`
// has room for kTile numbers.
void draw_chains(const Noise& noise, const Keys& keys, uint32_t first_chain, int64_t chains,
                 float* spare, float* out) {
  const int64_t elements = noise.elements, blocks = (elements + 3) / 4;
  float* packed = elements % 4 == 0 ? out : spare;
  float group[kGroup];
  for (int64_t first = 0; first < chains * blocks; first += kLanes) {
    const int64_t some = chains * blocks - first < kLanes ? chains * blocks - first : kLanes;
    Blocks at;
    for (int k = 0; k < kLanes; ++k) {
      const uint32_t q = static_cast<uint32_t>(first) + lane_block(k);
      const uint32_t row = q / static_cast<uint32_t>(blocks);
      at.block[k % 2][k / 2] = q - row * static_cast<uint32_t>(blocks);
      at.chain[k % 2][k / 2] = first_chain + row;
    }
    generate(at, noise, keys, some == kLanes ? packed + 4 * first : group);
    if (some < kLanes) copy(packed + 4 * first, group, 4 * some);
  }
  for (int64_t row = 0; packed == spare && row < chains; ++row) {
    copy(out + row * elements, packed + row * blocks * 4, elements);
  }
}

}  // namespace
}  // namespace FASTLANGEVIN_ISA
}  // namespace fastlangevin
