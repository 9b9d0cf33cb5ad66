// Puts the dimensions of a step in the order of memory and merges them if all operands allow it.
#pragma once

#include <algorithm>
#include <utility>

#include "common/step.h"

namespace fastlangevin {

namespace detail {

template <class F>
inline void each_strides(Step& step, F&& f) {
  for (Operand* operand : {&step.x, &step.grad, &step.noise}) {
    if (operand->data != nullptr) f(operand->strides);
  }
  if (step.draw) f(step.positions);
}

inline void swap_dims(Step& step, int p, int q) {
  std::swap(step.shape[p], step.shape[q]);
  each_strides(step, [=](int64_t* strides) { std::swap(strides[p], strides[q]); });
}

inline void remove_dim(Step& step, int d) {
  const int last = --step.dims;
  std::copy(step.shape + d + 1, step.shape + last + 1, step.shape + d);
  each_strides(step, [=](int64_t* s) { std::copy(s + d + 1, s + last + 1, s + d); });
}

}  // namespace detail

// Sorts the dimensions of a chain by one of the step's arrays of strides, largest first.
inline void sort_by(Step& step, const int64_t* strides) {
  for (int d = 2; d < step.dims; ++d) {
    for (int q = d; q > 1 && strides[q - 1] < strides[q]; --q) detail::swap_dims(step, q - 1, q);
  }
}

// Fills `positions` for a contiguous logical order, then sorts the dimensions of a chain by x's
// strides and merges neighbours. Contiguous operands become [chains, elements], and channels_last
// ones [chains, pixels, channels], or [chains, elements] if no noise needs the position. If chains
// need not be distinguished, they are merged too, with shape[0] = 1.
inline void collapse(Step& step) {
  int64_t elements = 1;
  for (int d = step.dims - 1; d > 0; --d) {
    step.positions[d] = elements;
    elements *= step.shape[d];
  }
  step.positions[0] = 0;
  const bool alike = !step.draw && step.scales == nullptr && step.noise_stds == nullptr;
  if (alike && step.dims < kMaxDims) {
    ++step.dims;
    std::copy_backward(step.shape, step.shape + step.dims - 1, step.shape + step.dims);
    step.shape[0] = 1;
    detail::each_strides(step, [&](int64_t* s) {
      std::copy_backward(s, s + step.dims - 1, s + step.dims);
      s[0] = 0;
    });
  }
  for (int d = step.dims - 1; d > 0; --d) {
    if (step.shape[d] == 1) detail::remove_dim(step, d);
  }
  sort_by(step, step.x.strides);
  for (int d = step.dims - 1; d > 1; --d) {
    bool merges = true;
    detail::each_strides(step, [&](const int64_t* strides) {
      merges = merges && strides[d - 1] == strides[d] * step.shape[d];
    });
    if (!merges) continue;
    step.shape[d - 1] *= step.shape[d];
    detail::each_strides(step, [=](int64_t* strides) { strides[d - 1] = strides[d]; });
    detail::remove_dim(step, d);
  }
}

}  // namespace fastlangevin
