// Vectors as wide as a register of the instruction set: the interface of Scalar over the compiler's
// vector types, with intrinsics only for operations that these cannot express.
//
// Source files that include this are compiled once per instruction set, in the set's namespace.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/step.h"

namespace fastlangevin {
namespace FASTLANGEVIN_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// A register with several lanes.
template <int kWide>
struct Register {
  using Float __attribute__((vector_size(4 * kWide))) = float;
  using Word __attribute__((vector_size(4 * kWide))) = uint32_t;

  static FASTLANGEVIN_INLINE Float broadcast(float value) { return value - Float{}; }
  static FASTLANGEVIN_INLINE Word bits(Float value) { return (Word)value; }
  static FASTLANGEVIN_INLINE Float from_bits(Word word) { return (Float)word; }
  static FASTLANGEVIN_INLINE Float load(const float* p) {
    Float value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  static FASTLANGEVIN_INLINE void store(float* p, Float value) {
    std::memcpy(p, &value, sizeof value);
  }
};

struct Vector : Register<kLanes> {
  using Int __attribute__((vector_size(4 * kLanes))) = int32_t;
  // A word in the low half of each 64-bit lane, which can be multiplied without a shuffle. The high
  // half is ignored.
  using Counter __attribute__((vector_size(4 * kLanes))) = uint64_t;

  // A bit for each lane of the result of a comparison, and back.
  static FASTLANGEVIN_INLINE uint32_t mask(Int lanes) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)lanes);
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)lanes));
#elif defined(__SSE2__)
    return static_cast<uint32_t>(_mm_movemask_ps((__m128)lanes));
#else
    uint32_t bits = 0;
    for (int k = 0; k < kLanes; ++k) bits |= static_cast<uint32_t>(lanes[k] & 1) << k;
    return bits;
#endif
  }
  static FASTLANGEVIN_INLINE Int lanes(uint32_t mask) {
#if defined(__AVX512F__)
    return (Int)_mm512_movm_epi32(static_cast<__mmask16>(mask));
#else
    Int bits;
    for (int k = 0; k < kLanes; ++k) bits[k] = 1 << k;
    return ((static_cast<int32_t>(mask) - Int{}) & bits) != 0;
#endif
  }

  static FASTLANGEVIN_INLINE void multiply(Counter a, uint32_t b, Counter& high, Counter& low) {
#if defined(__AVX512F__)
    low = (Counter)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    low = (Counter)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
    low = (Counter)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
    low = (a & 0xffffffffu) * b;
#endif
    high = low >> 32;
  }
  static FASTLANGEVIN_INLINE Float to_float(Int value) {
    return __builtin_convertvector(value, Float);
  }
  // NaN stays NaN. Without AVX-512 the compiler makes a comparison and a blend of each of the last
  // lines.
  static FASTLANGEVIN_INLINE Float clamp(Float x, Float lo, Float hi) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (Float)_mm256_min_ps((__m256)hi, _mm256_max_ps((__m256)lo, (__m256)x));
#elif defined(__SSE2__) && !defined(__AVX2__)
    return (Float)_mm_min_ps((__m128)hi, _mm_max_ps((__m128)lo, (__m128)x));
#else
    x = x < lo ? lo : x;
    return x > hi ? hi : x;
#endif
  }
  static FASTLANGEVIN_INLINE Float sqrt(Float value) {
#if defined(__AVX512F__)
    return (Float)_mm512_sqrt_ps((__m512)value);
#elif defined(__AVX2__)
    return (Float)_mm256_sqrt_ps((__m256)value);
#elif defined(__SSE2__)
    return (Float)_mm_sqrt_ps((__m128)value);
#else
    for (int k = 0; k < kLanes; ++k) value[k] = __builtin_sqrtf(value[k]);
    return value;
#endif
  }
};

// kCount registers of V, with the operators of one. The other operand is a Pack or a number.
template <class V, int kCount>
struct Pack {
  V v[kCount];

  Pack() = default;
  template <class U>
  explicit FASTLANGEVIN_INLINE Pack(const Pack<U, kCount>& other) {
    for (int k = 0; k < kCount; ++k) v[k] = (V)other.v[k];
  }

  static FASTLANGEVIN_INLINE V part(const Pack& pack, int k) { return pack.v[k]; }
  template <class B>
  static FASTLANGEVIN_INLINE B part(B number, int) {
    return number;
  }

  template <class B>
  friend FASTLANGEVIN_INLINE Pack operator+(Pack a, const B& b) {
    for (int k = 0; k < kCount; ++k) a.v[k] = a.v[k] + part(b, k);
    return a;
  }
  template <class B>
  friend FASTLANGEVIN_INLINE Pack operator-(Pack a, const B& b) {
    for (int k = 0; k < kCount; ++k) a.v[k] = a.v[k] - part(b, k);
    return a;
  }
  template <class B>
  friend FASTLANGEVIN_INLINE Pack operator*(Pack a, const B& b) {
    for (int k = 0; k < kCount; ++k) a.v[k] = a.v[k] * part(b, k);
    return a;
  }
  template <class B>
  friend FASTLANGEVIN_INLINE Pack operator&(Pack a, const B& b) {
    for (int k = 0; k < kCount; ++k) a.v[k] = a.v[k] & part(b, k);
    return a;
  }
  template <class B>
  friend FASTLANGEVIN_INLINE Pack operator^(Pack a, const B& b) {
    for (int k = 0; k < kCount; ++k) a.v[k] = a.v[k] ^ part(b, k);
    return a;
  }
  template <class B>
  friend FASTLANGEVIN_INLINE Pack operator<<(Pack a, const B& b) {
    for (int k = 0; k < kCount; ++k) a.v[k] = a.v[k] << part(b, k);
    return a;
  }
  template <class B>
  friend FASTLANGEVIN_INLINE Pack operator>>(Pack a, const B& b) {
    for (int k = 0; k < kCount; ++k) a.v[k] = a.v[k] >> part(b, k);
    return a;
  }
};

// The arithmetic of kCount registers at a time: the interface of Vector, as far as the normals use
// it. The operations of the registers alternate, so that a processor overlaps their chains.
template <int kCount>
struct Several {
  using Float = Pack<Vector::Float, kCount>;
  using Int = Pack<Vector::Int, kCount>;
  using Word = Pack<Vector::Word, kCount>;

  static FASTLANGEVIN_INLINE Float to_float(const Int& value) {
    Float result;
    for (int k = 0; k < kCount; ++k) result.v[k] = Vector::to_float(value.v[k]);
    return result;
  }
  static FASTLANGEVIN_INLINE Word bits(const Float& value) { return (Word)value; }
  static FASTLANGEVIN_INLINE Float from_bits(const Word& word) { return (Float)word; }
  static FASTLANGEVIN_INLINE Float sqrt(Float value) {
    for (int k = 0; k < kCount; ++k) value.v[k] = Vector::sqrt(value.v[k]);
    return value;
  }
};

// Interleaves even and odd lanes, which are words in 64-bit lanes.
FASTLANGEVIN_INLINE Vector::Word interleave(Vector::Counter even, Vector::Counter odd) {
  return (Vector::Word)((even & 0xffffffffu) | odd << 32);
}

// Writes 4 kLanes numbers with the four of each block next to each other; z[k] holds the k-th of
// each block. Only groups of four lanes are transposed, which needs no move between groups. The
// lane of a block (lane_block) is chosen so that the result is in order.
FASTLANGEVIN_INLINE void store_blocks(float* out, const Vector::Float (&z)[4]) {
  using Index = Vector::Int;
  Index low, high, first, second;
  for (int k = 0; k < kLanes; ++k) {  // the indices are constants once this is unrolled
    const int base = k & ~3, in = k & 3;
    low[k] = base + in / 2 + (in % 2) * kLanes;
    high[k] = low[k] + 2;
    first[k] = base + in % 2 + (in / 2) * kLanes;
    second[k] = first[k] + 2;
  }
  const Vector::Float low01 = __builtin_shuffle(z[0], z[1], low);
  const Vector::Float low23 = __builtin_shuffle(z[2], z[3], low);
  const Vector::Float high01 = __builtin_shuffle(z[0], z[1], high);
  const Vector::Float high23 = __builtin_shuffle(z[2], z[3], high);
  Vector::store(out, __builtin_shuffle(low01, low23, first));
  Vector::store(out + kLanes, __builtin_shuffle(low01, low23, second));
  Vector::store(out + 2 * kLanes, __builtin_shuffle(high01, high23, first));
  Vector::store(out + 3 * kLanes, __builtin_shuffle(high01, high23, second));
}

constexpr int lane_block(int lane) { return lane % 4 * (kLanes / 4) + lane / 4; }

}  // namespace FASTLANGEVIN_ISA
}  // namespace fastlangevin
