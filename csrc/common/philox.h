// The random numbers, for scalars (host and device) and for vectors of any width.
//
// The address of a number is (seed, stream, chain, step, element). A Philox4x32-10 block, with the
// counter (element / 4, chain, step, stream) and the 64-bit seed as its key (low word first),
// belongs to four elements of a chain, counted in logical (C, H, W) order:
//
//     u(w) = (w >> 8) 2^-24  in [0, 1)        v(w) = ((w >> 8) + 1) 2^-24  in (0, 1]
//     z0 = sqrt(-2 ln v(w0)) cos(2 pi u(w1))  z1 = sqrt(-2 ln v(w0)) sin(2 pi u(w1))
//
// and z2, z3 likewise from w2, w3.
//
// The normals use only correctly rounded operations (+, *, sqrt, conversions), and must be compiled
// without contraction to fused multiply-adds on the host and on the device. Then every instruction
// set gives the same bits. The polynomials are minimax fits. Over all 2^24 arguments, the error of
// the radius is at most 4.6e-7 and that of sine and cosine 2.1e-7 (csrc/tests/test_philox.cpp), so
// that the error of a normal is at most 1.9e-6. Its specified bound is 2e-6.
#pragma once

#include <cstdint>
#include <cstring>

// Forced inlining is not only for speed. This header is compiled for several instruction sets, and
// the linker could otherwise use one out-of-line copy in code for a processor that cannot run it.
#ifdef __CUDACC__
#define FASTLANGEVIN_INLINE __host__ __device__ __forceinline__
#else
#define FASTLANGEVIN_INLINE inline __attribute__((always_inline))
#endif

namespace fastlangevin {

constexpr uint32_t kLangevin = 0;  // the stream of the noise of the Langevin steps

// Arithmetic on one number at a time; simd.h has the same interface for vectors.
struct Scalar {
  using Float = float;
  using Int = int32_t;
  using Word = uint32_t;     // a Philox word, for arithmetic on its bits
  using Counter = uint32_t;  // a Philox word, for multiplication

  static FASTLANGEVIN_INLINE void multiply(Counter a, uint32_t b, Counter& high, Counter& low) {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    high = static_cast<Counter>(product >> 32);
    low = static_cast<Counter>(product);
  }
  static FASTLANGEVIN_INLINE Float broadcast(float value) { return value; }
  static FASTLANGEVIN_INLINE Float to_float(Int value) { return static_cast<float>(value); }
  static FASTLANGEVIN_INLINE Word bits(Float value) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(value);
#else
    Word word;
    std::memcpy(&word, &value, sizeof word);
    return word;
#endif
  }
  static FASTLANGEVIN_INLINE Float from_bits(Word word) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(word);
#else
    Float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
#endif
  }
  // Comparisons with NaN are false, so that NaN stays; plain min and max would drop it. PTX has
  // max.NaN, in one instruction instead of two, but it turns -0 at a bound of +0 into +0 and every
  // NaN into one.
  static FASTLANGEVIN_INLINE Float clamp(Float x, Float lo, Float hi) {
    x = x < lo ? lo : x;
    return x > hi ? hi : x;
  }
  static FASTLANGEVIN_INLINE Float sqrt(Float value) {
#ifdef __CUDA_ARCH__
    return __fsqrt_rn(value);
#else
    return __builtin_sqrtf(value);
#endif
  }
};

constexpr int kRounds = 10;

// The two keys of each round, from the seed.
template <class N>
struct KeySchedule {
  typename N::Counter keys[2 * kRounds];

  explicit FASTLANGEVIN_INLINE KeySchedule(uint64_t seed) {
    uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; ++round) {
      keys[2 * round] = typename N::Counter{} + low;
      keys[2 * round + 1] = typename N::Counter{} + high;
      low += 0x9E3779B9u;
      high += 0xBB67AE85u;
    }
  }
};

// A round of Philox4x32-10 (Salmon et al. 2011, constants of Random123), in place on the counter.
template <class N>
FASTLANGEVIN_INLINE void philox_round(typename N::Counter (&counter)[4],
                                      const KeySchedule<N>& schedule, int round) {
  typename N::Counter high0, low0, high1, low1;
  N::multiply(counter[0], 0xD2511F53u, high0, low0);
  N::multiply(counter[2], 0xCD9E8D57u, high1, low1);
  counter[0] = high1 ^ counter[1] ^ schedule.keys[2 * round];
  counter[1] = low1;
  counter[2] = high0 ^ counter[3] ^ schedule.keys[2 * round + 1];
  counter[3] = low0;
}

template <class N>
FASTLANGEVIN_INLINE void philox(typename N::Counter (&counter)[4], const KeySchedule<N>& schedule) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif !defined(__CUDACC__)
#pragma GCC unroll kRounds
#endif
  for (int round = 0; round < kRounds; ++round) philox_round<N>(counter, schedule, round);
}

// u(w).
template <class N>
FASTLANGEVIN_INLINE typename N::Float uniform(typename N::Word w) {
  return N::to_float((typename N::Int)(w >> 8)) * 0x1p-24f;
}

// sqrt(-2 ln v(w)), from (w >> 8) + 1 = m 2^e with m in [sqrt(1/2), sqrt(2)).
template <class N>
FASTLANGEVIN_INLINE typename N::Float radius(typename N::Word w) {
  using Int = typename N::Int;
  using Float = typename N::Float;
  constexpr int32_t kSqrtHalf = 0x3f3504f3;  // the bits of sqrt(1/2)
  const Int offset = (Int)N::bits(N::to_float((Int)((w >> 8) + 1))) - kSqrtHalf;
  const Float exponent = N::to_float((offset >> 23) - 24);
  const Float f =
      N::from_bits((typename N::Word)((offset & 0x007fffff) + kSqrtHalf)) - 1.0f;  // m - 1
  // -2 ln(1 + f) / f
  Float p = f * -0.17444715f + 0.2873369f;
  p = p * f + -0.29904532f;
  p = p * f + 0.33124787f;
  p = p * f + -0.39913666f;
  p = p * f + 0.5000415f;
  p = p * f + -0.66668373f;
  p = p * f + 0.99999976f;
  p = p * f + -2.0f;
  return N::sqrt(exponent * -1.3862944f + f * p);  // -2 ln 2 e - 2 ln m
}

// Two normals, from the words of the radius and of the angle.
template <class N>
FASTLANGEVIN_INLINE void box_muller(typename N::Word w_radius, typename N::Word w_angle,
                                    typename N::Float& z0, typename N::Float& z1) {
  using Word = typename N::Word;
  using Float = typename N::Float;
  // Half turns are removed exactly: the bits of u without the first, read as a signed number, are
  // y = 4 (u - half turns) in [-1, 1), and an odd number of half turns flips both signs.
  const Word shifted = w_angle << 1;
  const Word sign = (w_angle ^ shifted) & 0x80000000u;
  const Float y = N::to_float((typename N::Int)(shifted & 0xfffffe00u)) * 0x1p-31f;
  const Float q = y * y;
  Float s = q * 0.00015082264f + -0.004672233f;  // sin(pi / 2 y) / y
  s = s * q + 0.07968848f;
  s = s * q + -0.6459634f;
  s = s * q + 1.5707963f;
  Float c = q * 0.0008596901f + -0.020813966f;  // cos(pi / 2 y)
  c = c * q + 0.2536532f;
  c = c * q + -1.2336988f;
  c = c * q + 1.0f;
  const Float r = N::from_bits(N::bits(radius<N>(w_radius)) ^ sign);
  z0 = r * c;
  z1 = r * (y * s);
}

// The four normals (or uniforms) of a block.
FASTLANGEVIN_INLINE void normal4(uint32_t block, uint32_t chain, uint32_t step, uint32_t stream,
                                 uint64_t seed, float (&z)[4]) {
  uint32_t w[4] = {block, chain, step, stream};
  philox<Scalar>(w, KeySchedule<Scalar>(seed));
  box_muller<Scalar>(w[0], w[1], z[0], z[1]);
  box_muller<Scalar>(w[2], w[3], z[2], z[3]);
}

FASTLANGEVIN_INLINE void uniform4(uint32_t block, uint32_t chain, uint32_t step, uint32_t stream,
                                  uint64_t seed, float (&u)[4]) {
  uint32_t w[4] = {block, chain, step, stream};
  philox<Scalar>(w, KeySchedule<Scalar>(seed));
  for (int k = 0; k < 4; ++k) u[k] = uniform<Scalar>(w[k]);
}

}  // namespace fastlangevin
