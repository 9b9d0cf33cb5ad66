// The dtypes in which tensors are stored, and their conversions to and from float32.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

#include "common/philox.h"

namespace fastlangevin {

enum class Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Converts bfloat16 and float16, as bits, to float32 and back. Rounding is to nearest, ties to
// even, and NaN stays NaN.
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
  // The product moves the exponent from bias 15 to 127 and normalises subnormals.
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
  if (magnitude < 0x38800000u) {  // subnormal: an addition aligns and rounds the mantissa
    const uint32_t aligned = Scalar::bits(Scalar::from_bits(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (aligned - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u;
  return static_cast<uint16_t>(sign | rounded >> 13);
#endif
}

// The storage type of a dtype, and its conversions.
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

// Calls f with the dtype as a compile-time constant.
template <Dtype kValue>
struct DtypeConstant {
  static constexpr Dtype value = kValue;
};

template <class F>
inline void with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(DtypeConstant<Dtype::kFloat32>{});
    case Dtype::kBFloat16:
      return f(DtypeConstant<Dtype::kBFloat16>{});
    case Dtype::kFloat16:
      return f(DtypeConstant<Dtype::kFloat16>{});
  }
}

}  // namespace fastlangevin
