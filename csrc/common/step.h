// The arithmetic of a step, for the CPU (scalars and vectors) and CUDA, and its arguments.
//
//     x <- clamp(x + (s a clip(g) + b z))             s = -1 (descend) or +1 (maximize)
//     x <- clamp(x + s a clip(g)) + b z               noise_last
//
// It is computed in float32 for every storage dtype, and every operation is rounded once, without
// fused multiply-adds. All results have the same bits on CPUs and GPUs, except the sign and payload
// of a NaN that comes out of an addition or a product, which are the processor's own.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/philox.h"

namespace fastlangevin {

// Enough for the chains and any layout of up to seven further dimensions. Tensors with more are
// rare and fall back to the reference.
constexpr int kMaxDims = 8;

// A tensor of the step: its address (null if absent) and its strides in elements.
struct Operand {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t strides[kMaxDims] = {};
};

struct Step {
  int dims = 1;                      // shape[0] counts chains
  int64_t shape[kMaxDims] = {};      // the shape of every operand
  int64_t positions[kMaxDims] = {};  // strides of an element's index within its chain
  Operand x, grad, noise;            // x is read and written

  float scale = 0;                    // s a
  float noise_std = 0;                // b
  const float* scales = nullptr;      // per chain: a, to be multiplied by `scale` = s
  const float* noise_stds = nullptr;  // per chain: b
  int64_t scales_stride = 1, noise_stds_stride = 1;
  float clip = __builtin_inff();  // infinite bounds have no effect and no cost
  float lo = -__builtin_inff(), hi = __builtin_inff();
  bool noise_last = false;

  bool draw = false;  // whether to draw z, at the following address
  uint64_t seed = 0;
  uint32_t step = 0, first_chain = 0;
  const int64_t* rng_state = nullptr;  // CUDA: {seed, first step} in device memory; the kernel
                                       // takes this seed and adds the first step to `step`

  FASTLANGEVIN_INLINE bool noisy() const { return draw || noise.data != nullptr; }
  FASTLANGEVIN_INLINE int64_t elements() const {
    int64_t product = 1;
    for (int d = 1; d < dims; ++d) product *= shape[d];
    return product;
  }
};

enum class Fill : int32_t { kNormal = 0, kUniform = 1 };

// The contiguous noise of one step for chains [first_chain, first_chain + chains).
struct Noise {
  uint64_t seed;
  uint32_t step, stream, first_chain;
  Fill fill;
  int64_t chains, elements;
};

struct Bounds {
  float clip, lo, hi;

  explicit FASTLANGEVIN_INLINE Bounds(const Step& step)
      : clip(step.clip), lo(step.lo), hi(step.hi) {}
};

// The step of one element or of a vector N of them. a includes the sign s; kGrad and kNoise say
// which terms are present.
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
    return x;
  }
}

// Calls f(grad, noise, noise_last) with the form of the step as compile-time constants.
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
  return f(False{}, False{}, True{});  // the step only clamps
}

}  // namespace fastlangevin
