// The entry points of the CUDA backend. They throw std::runtime_error if CUDA reports an error.
#pragma once

#include <cuda_runtime.h>

#include "common/step.h"

namespace fastlangevin {
namespace cuda {

// The reason why the kernels cannot run on a device; empty if they can.
const char* reason(int device);

// out must have x's dtype, and given noise must be float32.
void langevin_step(Step step, int device, cudaStream_t stream);
void fill_noise(const Noise& noise, float* out, int device, cudaStream_t stream);

}  // namespace cuda
}  // namespace fastlangevin
