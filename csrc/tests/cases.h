// Test cases of steps: sizes around every boundary, layouts, dtypes and options, in guarded memory.
#pragma once

#include <cstdint>
#include <vector>

#include "common/step.h"

namespace fastlangevin {

// A tensor of shape [chains, channels, pixels] in its own memory of exactly the size it needs.
class Tensor {
 public:
  Tensor(int64_t chains, int64_t channels, int64_t pixels, Dtype dtype, bool channels_last,
         int offset, uint32_t salt)
      : dtype_(dtype),
        size_(chains * channels * pixels),
        bytes_((offset + size_) * (dtype == Dtype::kFloat32 ? 4 : 2)),
        offset_(offset) {
    strides_[0] = channels * pixels;
    strides_[1] = channels_last ? 1 : pixels;
    strides_[2] = channels_last ? channels : 1;
    for (int64_t n = 0; n < chains; ++n) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t p = 0; p < pixels; ++p) {
          const int64_t logical = (n * channels + c) * pixels + p;
          const uint32_t hash = (static_cast<uint32_t>(logical) + salt) * 2654435761u;
          set(n * strides_[0] + c * strides_[1] + p * strides_[2],
              static_cast<float>(static_cast<int32_t>(hash)) * 0x1p-31f);
        }
      }
    }
  }

  Operand operand() {
    Operand o;
    const int64_t start = offset_ * (dtype_ == Dtype::kFloat32 ? 4 : 2);
    o.data = bytes_.data() + start;
    o.dtype = dtype_;
    for (int d = 0; d < 3; ++d) o.strides[d] = strides_[d];
    return o;
  }
  const std::vector<unsigned char>& bytes() const { return bytes_; }

 private:
  void set(int64_t at, float value) {
    void* data = bytes_.data();
    with_dtype(dtype_, [&](auto d) {
      using Type = typename Storage<decltype(d)::value>::Type;
      static_cast<Type*>(data)[offset_ + at] = Storage<decltype(d)::value>::write(value);
    });
  }

  Dtype dtype_;
  int64_t size_;
  std::vector<unsigned char> bytes_;
  int64_t offset_;
  int64_t strides_[3];
};

struct Case {
  int64_t chains, channels, pixels;
  Dtype dtypes[2];  // of x and of the gradient
  bool channels_last[2];
  int offset;  // of all operands, in elements; they are misaligned unless it is 0
  bool grad, given_noise, draw, per_chain, noise_last;
};

// Runs one case and returns the bytes of x.
template <class Run>
std::vector<unsigned char> outcome(const Case& c, Run&& run) {
  const auto tensor = [&](int which, uint32_t salt) {
    return Tensor(c.chains, c.channels, c.pixels, c.dtypes[which], c.channels_last[which], c.offset,
                  salt);
  };
  Tensor x = tensor(0, 1), grad = tensor(1, 2);
  Tensor noise(c.chains, c.channels, c.pixels, Dtype::kFloat32, c.channels_last[1], c.offset, 4);
  const std::vector<float> scales(static_cast<size_t>(c.chains), 0.75f);
  std::vector<float> stds(static_cast<size_t>(c.chains));
  for (size_t n = 0; n < stds.size(); ++n) stds[n] = 0.01f * static_cast<float>(n + 1);
  Step step;
  step.dims = 3;
  step.shape[0] = c.chains, step.shape[1] = c.channels, step.shape[2] = c.pixels;
  step.x = x.operand();
  if (c.grad) step.grad = grad.operand();
  if (c.given_noise) step.noise = noise.operand();
  step.scale = -0.3f, step.noise_std = 0.05f;
  if (c.per_chain) step.scales = scales.data(), step.noise_stds = stds.data();
  step.clip = 0.7f, step.lo = -0.5f, step.hi = 1.0f;
  step.noise_last = c.noise_last;
  step.draw = c.draw && !c.given_noise;
  step.seed = 0xfedcba9876543210, step.step = 41, step.first_chain = 0xfffff000u;
  run(step);
  return x.bytes();
}

// There are millions of combinations, so options are drawn from a counter; every size gets many.
template <class F>
void each_case(F&& f) {
  const int64_t sizes[][3] = {{0, 1, 5},   {1, 1, 1},    {3, 1, 3},    {2, 1, 4},    {5, 1, 5},
                              {2, 3, 25},  {2, 1, 1023}, {3, 3, 1024}, {2, 1, 4095}, {2, 1, 4097},
                              {2, 130, 9}, {70, 2, 3},   {1, 5, 1201}, {4, 3, 256},  {1, 1, 40007}};
  uint32_t number = 0;
  for (const auto& size : sizes) {
    for (int repeat = 0; repeat < 60; ++repeat) {
      uint32_t w[4] = {number++, 0, 0, 0};
      philox<Scalar>(w, KeySchedule<Scalar>(7));
      const auto bit = [&](int k) { return (w[1] >> k & 1u) != 0; };
      f(Case{size[0],
             size[1],
             size[2],
             {Dtype(w[0] % 3), Dtype(w[0] / 3 % 3)},
             {bit(0), bit(1)},
             bit(3) ? static_cast<int>(w[2] % 4) : 0,
             bit(4) || bit(5),
             bit(6) && bit(7),
             bit(8) || bit(9),
             bit(10),
             bit(11)});
    }
  }
}

}  // namespace fastlangevin
