// The CUDA backend's entry points. They throw std::runtime_error where CUDA reports an error.
#pragma once

#include <cuda_runtime.h>

#include "common/step.h"

namespace fastlangevin {
namespace cuda {

// Why the kernels cannot run on a device; empty where they can.
const char* reason(int device);

// out must be of x's dtype and given noise of float32.
void langevin_step(Step step, int device, cudaStream_t stream);
void fill_noise(const Noise& noise, float* out, int device, cudaStream_t stream);

}  // namespace cuda
}  // namespace fastlangevin
