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
  Float p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
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
struct LeakyReLU {
  static constexpr bool kSmooth = false;
  float leak;
  FASTLANGEVIN_INLINE Vector::Float operator()(Vector::Float z, Vector::Float&) const {
    return z > 0.0f ? z : z * leak;
  }
};

// The product of a leak of 0 and an infinity would be NaN.
struct ReLU {
  static constexpr bool kSmooth = false;
  FASTLANGEVIN_INLINE Vector::Float operator()(Vector::Float z, Vector::Float&) const {
    return z <= 0.0f ? Vector::Float{} : z;
  }
};

struct SiLU {
  static constexpr bool kSmooth = true;
  FASTLANGEVIN_INLINE Vector::Float operator()(Vector::Float z, Vector::Float& slope) const {
    const Vector::Float s = 1.0f / (1.0f + exponential(-z)), y = z * s;
    slope = s + y * (1.0f - s);
    return y;
  }
};

struct Softplus {
  static constexpr bool kSmooth = true;
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
  static constexpr bool kSmooth = true;
  float alpha;
  FASTLANGEVIN_INLINE Vector::Float operator()(Vector::Float z, Vector::Float& slope) const {
    const Vector::Float e = exponential(z) * alpha;
    slope = z > 0.0f ? Vector::broadcast(1.0f) : e;
    return z > 0.0f ? z : e - alpha;
  }
};

struct Tanh {
  static constexpr bool kSmooth = true;
  FASTLANGEVIN_INLINE Vector::Float operator()(Vector::Float z, Vector::Float& slope) const {
    const Vector::Float y = 1.0f - 2.0f / (1.0f + exponential(z + z));
    slope = 1.0f - y * y;
    return y;
  }
};

template <class F>
void with_activation(const ConvLayer& layer, const F& f) {
  const float* settings = layer.settings;
  switch (layer.activation) {
    case Activation::kLeakyReLU:
      return settings[0] == 0.0f ? f(ReLU{}) : f(LeakyReLU{settings[0]});
    case Activation::kSiLU: return f(SiLU{});
    case Activation::kSoftplus: return f(Softplus{settings[0], settings[1]});
    case Activation::kELU: return f(ELU{settings[0]});
    case Activation::kTanh: return f(Tanh{});
  }
}

// Calls f(times), where times(grad, value) is grad times the derivative that belongs to the stored
// value. Derivatives of smooth activations are stored `slopes` elements after the values. NaN
// propagates as it does in autograd.
template <class N, class F>
void with_slope(const ConvLayer& layer, int64_t slopes, const F& f) {
  using Float = Vector::Float;
  using Type = typename N::Type;
  if (layer.activation != Activation::kLeakyReLU) {
    return f([=](Float grad, const Type* value) { return grad * N::load(value + slopes); });
  }
  if (layer.settings[0] == 0.0f) {
    return f([](Float grad, const Type* value) { return N::load(value) <= 0.0f ? Float{} : grad; });
  }
  const float leak = layer.settings[0];
  f([=](Float grad, const Type* value) { return N::load(value) > 0.0f ? grad : grad * leak; });
}

}  // namespace
}  // namespace FASTLANGEVIN_ISA
}  // namespace fastlangevin
