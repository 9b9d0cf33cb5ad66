// Signs of activations, one bit each: all that the gradient of a piecewise linear one needs.
#pragma once

#include <cstdint>

#include "common/step.h"

namespace fastlangevin {
namespace cpu {

// Bit k % 8 of bits[k / 8] is values[k] > 0 or, with `unordered`, !(values[k] <= 0), which differ
// for NaN alone. The bits after the last value are 0.
void pack_signs(const void* values, Dtype dtype, int64_t count, bool unordered, uint8_t* bits,
                int threads);

// grad[k] where bit k is set, else slope grad[k]; 0 for slope 0 even where grad[k] is not finite.
void apply_signs(void* grad, Dtype dtype, int64_t count, const uint8_t* bits, float slope,
                 int threads);

}  // namespace cpu
}  // namespace fastlangevin
