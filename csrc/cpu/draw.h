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
// processor overlaps (1.2 times faster than a single pass, on Zen 5 with AVX-512). With kGroups
// = 2, the operations of two groups alternate (1.2 times faster than one, on Zen 3 with AVX2; three
// and four groups are not faster).
template <int kGroups>
FASTLANGEVIN_INLINE void draw_words(const Blocks& at, const Noise& noise, const Keys& keys,
                                    float* out) {
  Counter words[2 * kGroups][4];
  for (int k = 0; k < 2 * kGroups; ++k) {
    words[k][0] = at.block[k % 2] + static_cast<uint64_t>(k / 2 * kLanes);
    words[k][1] = at.chain[k % 2];
    words[k][2] = Counter{} + noise.step;
    words[k][3] = Counter{} + noise.stream;
  }
#pragma GCC unroll kRounds
  for (int round = 0; round < kRounds; ++round) {
    for (Counter(&counter)[4] : words) philox_round<Vector>(counter, keys, round);
  }
  for (int k = 0; k < 4 * kGroups; ++k) {
    const int even = k / 4 * 2;
    const Vector::Word word = interleave(words[even][k % 4], words[even + 1][k % 4]);
    Vector::store(out + k * kLanes, Vector::from_bits(word));
  }
}

template <int kGroups>
FASTLANGEVIN_INLINE void words_to_numbers(Fill fill, float* out) {
  using N = Several<2 * kGroups>;
  typename N::Word w[2];
  for (int k = 0; k < 4 * kGroups; ++k) {
    w[k % 2].v[k / 2] = Vector::bits(Vector::load(out + k * kLanes));
  }
  typename N::Float z[2];
  if (fill == Fill::kNormal) {
    box_muller<N>(w[0], w[1], z[0], z[1]);
  } else {
    for (int k = 0; k < 2; ++k) z[k] = uniform<N>(w[k]);
  }
  for (int group = 0; group < kGroups; ++group) {
    const int first = 2 * group;
    store_blocks(out + group * kGroup,
                 {z[0].v[first], z[1].v[first], z[0].v[first + 1], z[1].v[first + 1]});
  }
}

FASTLANGEVIN_INLINE void generate(const Blocks& at, const Noise& noise, const Keys& keys,
                                  float* out) {
  draw_words<1>(at, noise, keys, out);
  words_to_numbers<1>(noise.fill, out);
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
  const int64_t whole = count / kGroup * kGroup, pairs = whole / (2 * kGroup) * (2 * kGroup);
  for (int64_t k = 0; k < pairs; k += 2 * kGroup) {
    draw_words<2>(at, noise, keys, out + k);
    for (int half = 0; half < 2; ++half) at.block[half] += 2 * kLanes;
  }
  for (int64_t k = 0; k < pairs; k += 2 * kGroup) words_to_numbers<2>(noise.fill, out + k);
  if (pairs < whole) {
    generate(at, noise, keys, out + pairs);
    for (int half = 0; half < 2; ++half) at.block[half] += kLanes;
  }
  if (whole < count) {
    generate(at, noise, keys, group);
    copy(out + whole, group, count - whole);
  }
}

// Draws all elements of several small chains, one chain after another if few lanes are then idle.
// Otherwise the lanes take blocks of different chains, at the cost of a division for each lane (1.7
// times as long for chains of 64 to 1,024 elements on an AMD EPYC with AVX2). `spare` has room for
// kTile numbers.
void draw_chains(const Noise& noise, const Keys& keys, uint32_t first_chain, int64_t chains,
                 float* spare, float* out) {
  const int64_t elements = noise.elements, blocks = (elements + 3) / 4;
  const int64_t idle = (elements + kGroup - 1) / kGroup * kGroup - elements;
  if (idle <= elements / 4) {
    for (int64_t row = 0; row < chains; ++row) {
      draw_span(noise, keys, first_chain + static_cast<uint32_t>(row), 0, elements,
                out + row * elements);
    }
    return;
  }
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
