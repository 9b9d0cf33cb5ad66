// Signs of activations as one bit each, which suffice for the gradient of a piecewise linear one.
#pragma once

#include <cstdint>

#include "common/step.h"

namespace fastlangevin {
namespace cpu {

// Bit k % 8 of bits[k / 8] becomes values[k] > 0 or, with `unordered`, !(values[k] <= 0). The two
// differ only for NaN. The bits after the last value are 0.
void pack_signs(const void* values, Dtype dtype, int64_t count, bool unordered, uint8_t* bits,
                int threads);

// Keeps grad[k] if bit k is set and multiplies it by slope otherwise. For slope 0 the result is 0,
// even if grad[k] is not finite.
void apply_signs(void* grad, Dtype dtype, int64_t count, const uint8_t* bits, float slope,
                 int threads);

}  // namespace cpu
}  // namespace fastlangevin
