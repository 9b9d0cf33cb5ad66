// The step contract, once, for the CPU (scalars and vectors) and CUDA, and the arguments of a step.
//
//     x <- clamp(x + (s a clip(g) + b z))             s = -1 (descend) or +1 (maximize)
//     x <- clamp(x + s a clip(g)) + b z               noise_last
//     x <- clamp(clamp(x + s a clip(g)) + b z)        noise_last and clamp_noise: the move of one
//                                                     step joined with the noise before the next
//
// computed in float32 whatever the storage, every operation rounded once (no fused multiply-adds).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

#include "philox.h"

namespace fastlangevin {

enum class Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Enough for a chain dimension and any layout of a chain of up to seven dimensions; torch tensors
// of more are rare enough to be copied.
constexpr int kMaxDims = 8;

// A tensor of the step: where it is (null: absent) and its strides, in elements.
struct Operand {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t strides[kMaxDims] = {};
};

struct Step {
  int dims = 1;                        // shape[0] counts chains
  int64_t shape[kMaxDims] = {};        // of every operand
  int64_t positions[kMaxDims] = {};    // strides of an element's number within its chain
  Operand x, out, grad, noise, cast;   // cast: what out then holds, in another dtype or layout

  float scale = 0;                     // s a
  float noise_std = 0;                 // b
  const float* scales = nullptr;       // per chain: a, to be multiplied by `scale` = s
  const float* noise_stds = nullptr;   // per chain: b
  int64_t scales_stride = 1, noise_stds_stride = 1;
  float clip = __builtin_inff();       // bounds at infinity bound nothing, and cost nothing
  float lo = -__builtin_inff(), hi = __builtin_inff();
  bool noise_last = false;
  bool clamp_noise = false;

  bool draw = false;                   // z from the generator, at the address that follows
  uint64_t seed = 0;
  uint32_t step = 0, first_chain = 0;
  const int64_t* state = nullptr;      // CUDA: {seed, first step} in device memory, read at launch,
                                       // replacing `seed` and added to `step`

  FASTLANGEVIN_INLINE bool noisy() const { return draw || noise.data != nullptr; }
  FASTLANGEVIN_INLINE int64_t elements() const {
    int64_t product = 1;
    for (int d = 1; d < dims; ++d) product *= shape[d];
    return product;
  }
};

enum class Fill : int32_t { kNormal = 0, kUniform = 1 };

// Noise of one step for chains [first_chain, first_chain + chains), contiguous.
struct Noise {
  uint64_t seed;
  uint32_t step, stream, first_chain;
  Fill fill;
  int64_t chains, elements;
};

struct Bounds {
  float clip, lo, hi, last_lo, last_hi;  // `last`: of the clamp after the noise, where there is one

  explicit FASTLANGEVIN_INLINE Bounds(const Step& step)
      : clip(step.clip), lo(step.lo), hi(step.hi),
        last_lo(step.clamp_noise ? step.lo : -__builtin_inff()),
        last_hi(step.clamp_noise ? step.hi : __builtin_inff()) {}
};

// One element of a step (or N of them). a carries the sign s; kGrad, kNoise: which terms there are.
template <class N, bool kGrad, bool kNoise, bool kNoiseLast>
FASTLANGEVIN_INLINE typename N::Float langevin(typename N::Float x, typename N::Float g,
                                               typename N::Float z, typename N::Float a,
                                               typename N::Float b, const Bounds& bounds) {
  using Float = typename N::Float;
  const auto clamp = [](Float value, float lo, float hi) {
    return N::clamp(value, N::broadcast(lo), N::broadcast(hi));
  };
  Float move = x, kick = x;
  if constexpr (kGrad) move = a * clamp(g, -bounds.clip, bounds.clip);
  if constexpr (kNoise) kick = b * z;
  if constexpr (!kNoiseLast) {
    if constexpr (kGrad && kNoise) move = move + kick;
    return clamp(x + (kGrad ? move : kick), bounds.lo, bounds.hi);
  } else {
    if constexpr (kGrad) x = x + move;
    x = clamp(x, bounds.lo, bounds.hi);
    if constexpr (kNoise) x = x + kick;
    return clamp(x, bounds.last_lo, bounds.last_hi);
  }
}

// Calls f(grad, noise, noise_last) with the step's form as compile-time constants.
template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

template <class F>
inline void with_form(const Step& step, F&& f) {
  const bool grad = step.grad.data != nullptr, noise = step.noisy(), last = step.noise_last;
  using True = Constant<true>;
  using False = Constant<false>;
  if (grad && noise && last) return f(True{}, True{}, True{});
  if (grad && noise) return f(True{}, True{}, False{});
  if (grad) return f(True{}, False{}, False{});
  if (noise && last) return f(False{}, True{}, True{});
  if (noise) return f(False{}, True{}, False{});
  return f(False{}, False{}, True{});  // only clamps
}

// bfloat16 and float16 as bits, to float32 and back (to nearest, ties to even; NaN stays NaN).
FASTLANGEVIN_INLINE float from_bfloat16(uint16_t value) {
  return Scalar::from_bits(static_cast<uint32_t>(value) << 16);
}

FASTLANGEVIN_INLINE uint16_t to_bfloat16(float value) {
  const uint32_t bits = Scalar::bits(value);
  const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  return static_cast<uint16_t>((value != value ? 0x7fc00000u : rounded) >> 16);
}

FASTLANGEVIN_INLINE float from_float16(uint16_t value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value));
#else
  // The exponent moves from bias 15 to 127 by a product, which also normalises subnormals.
  const float magnitude = Scalar::from_bits((value & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 65536.0f ? 0x7f800000u : 0u;  // infinity, NaN
  return Scalar::from_bits(Scalar::bits(magnitude) | special | (value & 0x8000u) << 16);
#endif
}

FASTLANGEVIN_INLINE uint16_t to_float16(float value) {
#ifdef __CUDA_ARCH__
  return __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = Scalar::bits(value), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 16 & 0x8000u;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds above 65504
  if (magnitude < 0x38800000u) {  // subnormal: let an addition align and round the mantissa
    const uint32_t aligned = Scalar::bits(Scalar::from_bits(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (aligned - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u;
  return static_cast<uint16_t>(sign | rounded >> 13);
#endif
}

// How a dtype is stored, and its conversions.
template <Dtype kDtype>
struct Storage {
  using Type = uint16_t;
  static FASTLANGEVIN_INLINE float read(Type value) {
    return kDtype == Dtype::kBFloat16 ? from_bfloat16(value) : from_float16(value);
  }
  static FASTLANGEVIN_INLINE Type write(float value) {
    return kDtype == Dtype::kBFloat16 ? to_bfloat16(value) : to_float16(value);
  }
};

template <>
struct Storage<Dtype::kFloat32> {
  using Type = float;
  static FASTLANGEVIN_INLINE float read(Type value) { return value; }
  static FASTLANGEVIN_INLINE Type write(float value) { return value; }
};

// A number as a dtype's storage would give it back.
template <Dtype kDtype>
FASTLANGEVIN_INLINE float rounded(float value) {
  return Storage<kDtype>::read(Storage<kDtype>::write(value));
}

// Calls f with the dtype as a compile-time constant.
template <Dtype kValue>
struct DtypeConstant {
  static constexpr Dtype value = kValue;
};

template <class F>
inline void with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32: return f(DtypeConstant<Dtype::kFloat32>{});
    case Dtype::kBFloat16: return f(DtypeConstant<Dtype::kBFloat16>{});
    case Dtype::kFloat16: return f(DtypeConstant<Dtype::kFloat16>{});
  }
}

}  // namespace fastlangevin
