// Activations and their derivatives on vectors of float32, without calls into libm.
#pragma once

#include "cpu/convnet_plan.h"
#include "cpu/simd.h"

namespace fastlangevin {
namespace FASTLANGEVIN_ISA {
namespace {

// e^x with a relative error of about 1e-7; 0 below the range of float32 and finite above it.
FASTLANGEVIN_INLINE Vector::Float exponential(Vector::Float x) {
  using Float = Vector::Float;
  using Int = Vector::Int;
  x = Vector::clamp(x, Vector::broadcast(-87.3f), Vector::broadcast(88.3f));
  // Rounds to the nearest integer: after adding 1.5 * 2^23, no bits are left for a fraction.
  const Float shift = Vector::broadcast(12582912.0f);
  const Float shifted = x * 1.44269504f + shift;
  const Float whole = shifted - shift;
  const Float r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  // The polynomial of this degree whose greatest error is least: 3e-9.
  Float p = r * 1.38145986e-3f + 8.36871698e-3f;
  p = p * r + 4.16683881e-2f;
  p = p * r + 0.166665206f;
  p = p * r + 0.499999934f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (Float)(((Int)shifted + (127 - 0x4b400000)) << 23);
}

// log(1 + v) for v in [0, 1], computed as 2 atanh(v / (2 + v)).
FASTLANGEVIN_INLINE Vector::Float log1p(Vector::Float v) {
  const Vector::Float s = v / (v + 2.0f), t = s * s;
  Vector::Float p = t * (2.0f / 15) + 2.0f / 13;
  p = p * t + 2.0f / 11;
  p = p * t + 2.0f / 9;
  p = p * t + 2.0f / 7;
  p = p * t + 2.0f / 5;
  p = p * t + 2.0f / 3;
  p = p * t + 2.0f;
  return p * s;
}

// For each activation, operator()(z, slope) returns its value at z and, if it is smooth, sets slope
// to its derivative there. The derivative of a piecewise linear activation follows from the sign of
// its value, so that only the value is stored.
struct Identity {
  static constexpr bool kSmooth = false, kLeaky = false;
  FASTLANGEVIN_INLINE Vector::Float operator()(Vector::Float z, Vector::Float&) const { return z; }
};

struct LeakyReLU {
  static constexpr bool kSmooth = false, kLeaky = true;
  float leak;
  FASTLANGEVIN_INLINE Vector::Float operator()(Vector::Float z, Vector::Float&) const {
    return z > 0.0f ? z : z * leak;
  }
};

// The product of a leak of 0 and an infinity would be NaN.
struct ReLU {
  static constexpr bool kSmooth = false, kLeaky = true;
  FASTLANGEVIN_INLINE Vector::Float operator()(Vector::Float z, Vector::Float&) const {
    return z <= 0.0f ? Vector::Float{} : z;
  }
};

struct SiLU {
  static constexpr bool kSmooth = true, kLeaky = false;
  float beta;
  FASTLANGEVIN_INLINE Vector::Float operator()(Vector::Float z, Vector::Float& slope) const {
    const Vector::Float s = 1.0f / (1.0f + exponential(z * -beta)), y = z * s;
    slope = s + y * beta * (1.0f - s);
    return y;
  }
};

struct Sigmoid {
  static constexpr bool kSmooth = true, kLeaky = false;
  FASTLANGEVIN_INLINE Vector::Float operator()(Vector::Float z, Vector::Float& slope) const {
    const Vector::Float s = 1.0f / (1.0f + exponential(-z));
    slope = s * (1.0f - s);
    return s;
  }
};

struct Softplus {
  static constexpr bool kSmooth = true, kLeaky = false;
  float beta, threshold;
  FASTLANGEVIN_INLINE Vector::Float operator()(Vector::Float z, Vector::Float& slope) const {
    const Vector::Float t = z * beta, e = exponential(t > 0.0f ? -t : t);
    const Vector::Float one = Vector::broadcast(1.0f);
    const Vector::Float y = ((t < 0.0f ? Vector::Float{} : t) + log1p(e)) / beta;
    slope = (t > 0.0f ? one : e) / (1.0f + e);
    slope = t > threshold ? one : slope;
    return t > threshold ? z : y;
  }
};

struct ELU {
  static constexpr bool kSmooth = true, kLeaky = false;
  float alpha;
  FASTLANGEVIN_INLINE Vector::Float operator()(Vector::Float z, Vector::Float& slope) const {
    const Vector::Float e = exponential(z) * alpha;
    slope = z > 0.0f ? Vector::broadcast(1.0f) : e;
    return z > 0.0f ? z : e - alpha;
  }
};

struct Tanh {
  static constexpr bool kSmooth = true, kLeaky = false;
  FASTLANGEVIN_INLINE Vector::Float operator()(Vector::Float z, Vector::Float& slope) const {
    const Vector::Float y = 1.0f - 2.0f / (1.0f + exponential(z + z));
    slope = 1.0f - y * y;
    return y;
  }
};

// e^(v^2) erfc(v) for v >= 0, with a relative error below 4e-7 while erfc(v) is in the range of
// float32: a polynomial in 1 / (1 + 3 v / 8), whose own greatest error is 1e-8.
FASTLANGEVIN_INLINE Vector::Float scaled_erfc(Vector::Float v) {
  const Vector::Float t = 1.0f / (1.0f + v * 0.375f);
  Vector::Float p = t * 0.0616965966f - 0.288075294f;
  p = p * t + 0.433893605f;
  p = p * t - 0.231076231f;
  p = p * t + 0.274843995f;
  p = p * t + 0.121039012f;
  p = p * t + 0.205430412f;
  p = p * t + 0.210633501f;
  p = p * t + 0.211614415f;
  return p * t;
}

struct GELU {
  static constexpr bool kSmooth = true, kLeaky = false;
  FASTLANGEVIN_INLINE Vector::Float operator()(Vector::Float z, Vector::Float& slope) const {
    const Vector::Float e = exponential(z * z * -0.5f);
    const Vector::Float half = scaled_erfc((z < 0.0f ? -z : z) * 0.707106781f) * e * 0.5f;
    const Vector::Float normal = z < 0.0f ? half : 1.0f - half;  // the distribution function at z
    slope = normal + z * (e * 0.398942280f);
    return z * normal;
  }
};

// z (1 + tanh(u)) / 2 for u = k (z + 0.044715 z^3), where (1 + tanh(u)) / 2 = 1 / (1 + e^(-2u)).
struct GELUTanh {
  static constexpr bool kSmooth = true, kLeaky = false;
  FASTLANGEVIN_INLINE Vector::Float operator()(Vector::Float z, Vector::Float& slope) const {
    constexpr float kTwice = 1.595769122f, kCube = 0.044715f;
    const Vector::Float square = z * z;
    const Vector::Float s = 1.0f / (1.0f + exponential(z * (square * kCube + 1.0f) * -kTwice));
    const Vector::Float y = z * s;
    slope = s + y * (1.0f - s) * (square * (3 * kCube) + 1.0f) * kTwice;
    return y;
  }
};

template <class F>
void with_activation(Activation activation, const float* settings, const F& f) {
  switch (activation) {
    case Activation::kIdentity:
      return f(Identity{});
    case Activation::kLeakyReLU:
      return settings[0] == 0.0f ? f(ReLU{}) : f(LeakyReLU{settings[0]});
    case Activation::kSiLU:
      return f(SiLU{settings[0]});
    case Activation::kSigmoid:
      return f(Sigmoid{});
    case Activation::kSoftplus:
      return f(Softplus{settings[0], settings[1]});
    case Activation::kELU:
      return f(ELU{settings[0]});
    case Activation::kTanh:
      return f(Tanh{});
    case Activation::kGELU:
      return f(GELU{});
    case Activation::kGELUTanh:
      return f(GELUTanh{});
  }
}

// Calls f(times_slope), where times_slope(grad, at) is grad times the derivative that belongs to
// the value at this place. The derivatives of smooth activations are stored in `slopes`. NaN
// propagates as it does in autograd.
template <class N, class F>
void with_slope(Activation activation, const float* settings, const typename N::Type* values,
                const typename N::Type* slopes, const F& f) {
  using Float = Vector::Float;
  if (activation == Activation::kIdentity) return f([](Float grad, int64_t) { return grad; });
  if (activation != Activation::kLeakyReLU) {
    return f([=](Float grad, int64_t at) { return grad * N::load(slopes + at); });
  }
  if (settings[0] == 0.0f) {
    return f([=](Float grad, int64_t at) { return N::load(values + at) <= 0.0f ? Float{} : grad; });
  }
  const float leak = settings[0];
  f([=](Float grad, int64_t at) { return N::load(values + at) > 0.0f ? grad : grad * leak; });
}

// Signs of values of leaky ReLU are bits, in the order of the values. A set bit stands for a
// derivative of 1. This is computed from the value that is stored, as in with_slope.
FASTLANGEVIN_INLINE void store_signs(uint8_t* signs, int64_t at, Vector::Float value, float leak) {
  using Int = Vector::Int;
  const uint32_t bits = Vector::mask(leak == 0.0f ? ~(Int)(value <= 0.0f) : (Int)(value > 0.0f));
  uint8_t* to = signs + at / 8;
  if constexpr (kLanes >= 8) {
    std::memcpy(to, &bits, kLanes / 8);
  } else {
    const int shift = at % 8;
    *to = static_cast<uint8_t>((*to & ~(15u << shift)) | bits << shift);
  }
}

FASTLANGEVIN_INLINE Vector::Int load_signs(const uint8_t* signs, int64_t at) {
  uint32_t bits = 0;
  std::memcpy(&bits, signs + at / 8, kLanes >= 8 ? kLanes / 8 : 1);
  return Vector::lanes(kLanes >= 8 ? bits : bits >> at % 8);
}

// The form of with_slope for leaky ReLU's signs.
template <class F>
void with_signs(float leak, const uint8_t* signs, const F& f) {
  using Float = Vector::Float;
  if (leak == 0.0f) {
    return f([=](Float grad, int64_t at) { return load_signs(signs, at) ? grad : Float{}; });
  }
  f([=](Float grad, int64_t at) { return load_signs(signs, at) ? grad : grad * leak; });
}

}  // namespace
}  // namespace FASTLANGEVIN_ISA
}  // namespace fastlangevin
