// The operands of a conv net's products, in float32 or bfloat16. Sums are float32.
#pragma once

#include "cpu/simd.h"

namespace fastlangevin {
namespace FASTLANGEVIN_ISA {
namespace {

// kStep input channels are multiplied at a time. A 32-bit word of weights holds kStep weights of
// one output channel.
struct Float32 {
  using Type = float;
  static constexpr int kStep = 1;

  template <class R>
  static FASTLANGEVIN_INLINE typename R::Float column(const float* w) {
    return R::load(w);
  }
  template <class R>
  static FASTLANGEVIN_INLINE typename R::Float broadcast(const float* from) {
    return R::broadcast(*from);
  }
  template <class R>
  static FASTLANGEVIN_INLINE void multiply_add(typename R::Float a, typename R::Float b,
                                               typename R::Float& sum) {
    sum += a * b;
  }
  static FASTLANGEVIN_INLINE Vector::Float load(const float* from) { return Vector::load(from); }
  static FASTLANGEVIN_INLINE void store(float* to, Vector::Float value) {
    Vector::store(to, value);
  }
  static FASTLANGEVIN_INLINE float narrow(float value) { return value; }
  static FASTLANGEVIN_INLINE float widen(float value) { return value; }
};

// Pairs of bfloat16 are multiplied by the processor's dot product if it has one, which also rounds
// the sum of a pair, and as two float32 products otherwise.
struct BFloat16 {
  using Type = uint16_t;
  using Halves __attribute__((vector_size(2 * kLanes))) = uint16_t;
  static constexpr int kStep = 2;

  template <class R>
  static FASTLANGEVIN_INLINE typename R::Word column(const float* w) {
    return R::bits(R::load(w));
  }
  template <class R>
  static FASTLANGEVIN_INLINE typename R::Word broadcast(const uint16_t* from) {
    uint32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return pair - typename R::Word{};
  }
  template <class R>
  static FASTLANGEVIN_INLINE void multiply_add(typename R::Word a, typename R::Word b,
                                               typename R::Float& sum) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof sum == 64) {
      sum = (typename R::Float)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    } else {
      sum = (typename R::Float)_mm256_dpbf16_ps((__m256)sum, (__m256bh)a, (__m256bh)b);
    }
#else
    sum += R::from_bits(a << 16) * R::from_bits(b << 16);
    sum += R::from_bits(a & 0xffff0000u) * R::from_bits(b & 0xffff0000u);
#endif
  }
  static FASTLANGEVIN_INLINE Vector::Float load(const uint16_t* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return Vector::from_bits(__builtin_convertvector(halves, Vector::Word) << 16);
  }
  static FASTLANGEVIN_INLINE void store(uint16_t* to, Vector::Float value) {
    // Rounds to nearest, ties to even; NaN stays NaN.
    const Vector::Word bits = Vector::bits(value);
    const Vector::Word rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const Vector::Word kept = value == value ? rounded : bits >> 16 | 0x40u;
    const Halves halves = __builtin_convertvector(kept, Halves);
    std::memcpy(to, &halves, sizeof halves);
  }
  static FASTLANGEVIN_INLINE uint16_t narrow(float value) { return to_bfloat16(value); }
  static FASTLANGEVIN_INLINE float widen(uint16_t value) { return from_bfloat16(value); }
};

}  // namespace
}  // namespace FASTLANGEVIN_ISA
}  // namespace fastlangevin
