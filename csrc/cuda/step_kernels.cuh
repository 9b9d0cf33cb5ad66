// The CUDA kernels. A thread computes the numbers of one Philox block, or of two if the elements of
// x have 2 bytes, so that it moves 16 bytes of x at a time in both cases.
//
// They are compiled with -fmad=false, since contracted products would give other bits than the CPU.
// That costs 8 of about 70 instructions per element.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "common/step.h"

namespace fastlangevin {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;

// Division by a number that is known at launch: the product with floor(2^64 / d) gives the quotient
// or one less.
struct Divisor {
  uint64_t divisor = 1, magic = ~uint64_t{0};

  Divisor() = default;
  explicit Divisor(int64_t d) : divisor(static_cast<uint64_t>(d)) {
    if (d > 1) magic = static_cast<uint64_t>((static_cast<unsigned __int128>(1) << 64) / divisor);
  }
  __device__ __forceinline__ int64_t divide(int64_t n, int64_t& remainder) const {
    uint64_t quotient = __umul64hi(static_cast<uint64_t>(n), magic);
    uint64_t rest = static_cast<uint64_t>(n) - quotient * divisor;
    if (rest >= divisor) {
      rest -= divisor;
      ++quotient;
    }
    remainder = static_cast<int64_t>(rest);
    return static_cast<int64_t>(quotient);
  }
};

struct Launch {
  Divisor items;            // of a chain; a thread takes one at a time
  int64_t threads;          // with work
  int64_t elements;         // of a chain
  Divisor shape[kMaxDims];  // of a chain's dimensions
  bool aligned;             // every item of every chain starts at a multiple of 16 bytes
};

// The element of a thread and its coefficients.
struct Item {
  int64_t chain, first;  // element
  float a, b;
  uint64_t seed;
  uint32_t step;

  __device__ __forceinline__ Item(const Step& s, const Launch& launch, int64_t thread, int size) {
    chain = launch.items.divide(thread, first);
    first *= size;
    a = s.scales ? s.scale * s.scales[chain * s.scales_stride] : s.scale;
    b = s.noise_stds ? s.noise_stds[chain * s.noise_stds_stride] : s.noise_std;
    // A term that is absent has a zero operand and is then -0, which changes no sum; +0 would make
    // +0 of a state of -0.
    if (!s.grad.data) a = -0.0f;
    if (!s.noisy()) b = -0.0f;
    seed = s.rng_state ? static_cast<uint64_t>(s.rng_state[0]) : s.seed;
    step = s.step + (s.rng_state ? static_cast<uint32_t>(s.rng_state[1]) : 0u);
  }
  __device__ __forceinline__ void draw(const Step& s, int64_t element, float (&z)[4]) const {
    normal4(static_cast<uint32_t>(element / 4), s.first_chain + static_cast<uint32_t>(chain), step,
            kLangevin, seed, z);
  }
  __device__ __forceinline__ float update(const Step& s, const Bounds& bounds, float x, float g,
                                          float z) const {
    return s.noise_last ? langevin<Scalar, true, true, true>(x, g, z, a, b, bounds)
                        : langevin<Scalar, true, true, false>(x, g, z, a, b, bounds);
  }
};

__device__ __forceinline__ int64_t thread_number() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

// Moves kSize neighbouring elements, by accesses of 16 bytes if they are aligned and complete.
template <class T, int kSize>
union Pack {
  using Vector = std::conditional_t<(sizeof(T) * kSize < kVectorBytes), uint2, uint4>;
  static constexpr int kVectors = static_cast<int>(sizeof(T) * kSize / sizeof(Vector));
  static_assert(kVectors * sizeof(Vector) == sizeof(T) * kSize, "whole vectors");

  T values[kSize] = {};
  Vector vectors[kVectors];
};

template <Dtype kDtype, int kSize>
__device__ __forceinline__ void read(const Operand& operand, int64_t offset, int count, bool whole,
                                     float (&values)[kSize]) {
  using Type = typename Storage<kDtype>::Type;
  const Type* from = static_cast<const Type*>(operand.data) + offset;
  using Numbers = Pack<Type, kSize>;
  Numbers pack;
  if (whole) {
    const auto* vectors = reinterpret_cast<const typename Numbers::Vector*>(from);
    for (int v = 0; v < Numbers::kVectors; ++v) pack.vectors[v] = vectors[v];
  } else {
    for (int k = 0; k < kSize; ++k) {
      if (k < count) pack.values[k] = from[k];
    }
  }
  for (int k = 0; k < kSize; ++k) values[k] = Storage<kDtype>::read(pack.values[k]);
}

template <Dtype kDtype, int kSize>
__device__ __forceinline__ void write(const Operand& operand, int64_t offset, int count, bool whole,
                                      const float (&values)[kSize]) {
  using Type = typename Storage<kDtype>::Type;
  Type* to = static_cast<Type*>(operand.data) + offset;
  using Numbers = Pack<Type, kSize>;
  Numbers pack;
  for (int k = 0; k < kSize; ++k) pack.values[k] = Storage<kDtype>::write(values[k]);
  if (whole) {
    auto* vectors = reinterpret_cast<typename Numbers::Vector*>(to);
    // The fields are named because nvcc 13.0 splits a plain assignment into four stores here.
    for (int v = 0; v < Numbers::kVectors; ++v) __stwb(vectors + v, pack.vectors[v]);
  } else {
    for (int k = 0; k < kSize; ++k) {
      if (k < count) to[k] = pack.values[k];
    }
  }
}

template <Dtype kX>
constexpr int kItem = kVectorBytes / static_cast<int>(sizeof(typename Storage<kX>::Type));

// For operands that store the elements of a chain contiguously, in the order of the noise.
template <Dtype kX, Dtype kGrad>
__global__ void __launch_bounds__(kThreads) linear_step(const Step step, const Launch launch) {
  constexpr int kSize = kItem<kX>;
  if (thread_number() >= launch.threads) return;
  const Item item(step, launch, thread_number(), kSize);
  const int64_t left = launch.elements - item.first;
  const int count = left < kSize ? static_cast<int>(left) : kSize;
  const bool whole = launch.aligned && count == kSize;
  const auto at = [&](const Operand& o) { return item.chain * o.strides[0] + item.first; };

  float x[kSize], g[kSize] = {}, z[kSize] = {};
  read<kX, kSize>(step.x, at(step.x), count, whole, x);
  if (step.grad.data) read<kGrad, kSize>(step.grad, at(step.grad), count, whole, g);
  if (step.noise.data) {
    read<Dtype::kFloat32, kSize>(step.noise, at(step.noise), count, whole, z);
  } else if (step.draw) {
    for (int block = 0; block < kSize; block += 4) {
      float four[4];
      item.draw(step, item.first + block, four);
      for (int k = 0; k < 4; ++k) z[block + k] = four[k];
    }
  }
  const Bounds bounds(step);
  for (int k = 0; k < kSize; ++k) x[k] = item.update(step, bounds, x[k], g[k], z[k]);
  write<kX, kSize>(step.x, at(step.x), count, whole, x);
}

__device__ __forceinline__ float read_one(const Operand& operand, int64_t offset) {
  if (operand.dtype == Dtype::kFloat32) return static_cast<const float*>(operand.data)[offset];
  const uint16_t value = static_cast<const uint16_t*>(operand.data)[offset];
  return operand.dtype == Dtype::kBFloat16 ? from_bfloat16(value) : from_float16(value);
}

__device__ __forceinline__ void write_one(const Operand& operand, int64_t offset, float value) {
  if (operand.dtype == Dtype::kFloat32) {
    static_cast<float*>(operand.data)[offset] = value;
  } else {
    static_cast<uint16_t*>(operand.data)[offset] =
        operand.dtype == Dtype::kBFloat16 ? to_bfloat16(value) : to_float16(value);
  }
}

// For any layouts. The dimensions are in logical order, and an item is four neighbours in it.
__global__ void __launch_bounds__(kThreads) strided_step(const Step step, const Launch launch) {
  if (thread_number() >= launch.threads) return;
  const Item item(step, launch, thread_number(), 4);
  float x[4], g[4] = {}, z[4] = {};
  int64_t to[4];
  if (step.draw) item.draw(step, item.first, z);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (item.first + k >= launch.elements) break;
    int64_t rest = item.first + k;
    int64_t grad_from = item.chain * step.grad.strides[0];
    int64_t noise_from = item.chain * step.noise.strides[0];
    to[k] = item.chain * step.x.strides[0];
    for (int d = step.dims - 1; d > 0; --d) {
      int64_t index;
      rest = launch.shape[d].divide(rest, index);
      to[k] += index * step.x.strides[d];
      grad_from += index * step.grad.strides[d];
      noise_from += index * step.noise.strides[d];
    }
    x[k] = read_one(step.x, to[k]);
    if (step.grad.data) g[k] = read_one(step.grad, grad_from);
    if (step.noise.data) z[k] = read_one(step.noise, noise_from);
  }
  const Bounds bounds(step);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (item.first + k >= launch.elements) break;
    write_one(step.x, to[k], item.update(step, bounds, x[k], g[k], z[k]));
  }
}

__global__ void __launch_bounds__(kThreads)
    fill(const Noise noise, float* const out, const Launch launch) {
  if (thread_number() >= launch.threads) return;
  int64_t block;
  const int64_t chain = launch.items.divide(thread_number(), block);
  const uint32_t address = noise.first_chain + static_cast<uint32_t>(chain);
  float z[4];
  if (noise.fill == Fill::kNormal) {
    normal4(static_cast<uint32_t>(block), address, noise.step, noise.stream, noise.seed, z);
  } else {
    uniform4(static_cast<uint32_t>(block), address, noise.step, noise.stream, noise.seed, z);
  }
  const int64_t left = launch.elements - 4 * block;
  const Operand to = {out, Dtype::kFloat32, {}};
  write<Dtype::kFloat32, 4>(to, chain * launch.elements + 4 * block,
                            left < 4 ? static_cast<int>(left) : 4, launch.aligned && left >= 4, z);
}

}  // namespace
}  // namespace cuda
}  // namespace fastlangevin
