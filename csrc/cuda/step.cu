// The entry points of the CUDA backend: the choice of a step's kernel, and its launch.
#include <stdexcept>
#include <string>

#include "common/layout.h"
#include "cuda/step.h"
#include "cuda/step_kernels.cuh"

namespace fastlangevin {
namespace cuda {
namespace {

void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

// Makes a device current, and restores the previous one at the end of its scope.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "fastlangevin: cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "fastlangevin: cudaSetDevice");
    changed_ = device != before_;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

Launch cut(int64_t chains, int64_t elements, int item) {
  Launch launch;
  const int64_t items = (elements + item - 1) / item;
  launch.items = Divisor(items);
  launch.threads = chains * items;
  launch.elements = elements;
  launch.aligned = false;
  return launch;
}

template <class... Parameters, class... Arguments>
void run(const char* name, void (*kernel)(Parameters...), const Launch& launch, int64_t chains,
         cudaStream_t stream, const Arguments&... arguments) {
  const int64_t blocks = (launch.threads + kThreads - 1) / kThreads;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  const cudaError_t error = blocks > INT32_MAX ? cudaErrorInvalidConfiguration
                                               : cudaLaunchKernelEx(&config, kernel, arguments...);
  check(error, std::string("fastlangevin: CUDA kernel ") + name + " on " + std::to_string(chains) +
                   " chains of " + std::to_string(launch.elements) + " elements (" +
                   std::to_string(blocks) + " blocks of " + std::to_string(kThreads) + " threads)");
}

template <class F>
void each_operand(const Step& step, F&& f) {
  for (const Operand* operand : {&step.x, &step.grad, &step.noise}) {
    if (operand->data != nullptr) f(*operand);
  }
}

bool is_linear(const Step& step) {
  bool linear = step.dims <= 2;
  each_operand(step,
               [&](const Operand& o) { linear = linear && (step.dims == 1 || o.strides[1] == 1); });
  return linear;
}

bool is_aligned(const Step& step) {
  bool aligned = true;
  each_operand(step, [&](const Operand& o) {
    const int64_t bytes = o.dtype == Dtype::kFloat32 ? 4 : 2;
    aligned = aligned && reinterpret_cast<uintptr_t>(o.data) % kVectorBytes == 0 &&
              (step.shape[0] == 1 || o.strides[0] * bytes % kVectorBytes == 0);
  });
  return aligned;
}

}  // namespace

const char* reason(int device) {
  try {
    const OnDevice here(device);
    cudaFuncAttributes attributes;
    const auto kernel = reinterpret_cast<const void*>(&strided_step);
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
  } catch (const std::runtime_error&) {
    return cudaGetErrorString(cudaGetLastError());
  }
}

void langevin_step(Step step, int device, cudaStream_t stream) {
  collapse(step);
  const int64_t chains = step.shape[0], elements = step.elements();
  if (chains * elements == 0) return;
  const OnDevice here(device);
  if (!is_linear(step)) {
    if (step.draw) sort_by(step, step.positions);
    Launch launch = cut(chains, elements, 4);
    for (int d = 1; d < step.dims; ++d) launch.shape[d] = Divisor(step.shape[d]);
    return run("strided_step", strided_step, launch, chains, stream, step, launch);
  }
  with_dtype(step.x.dtype, [&](auto x) {
    with_dtype(step.grad.dtype, [&](auto grad) {
      constexpr Dtype kX = decltype(x)::value;
      Launch launch = cut(chains, elements, kItem<kX>);
      launch.aligned = is_aligned(step);
      run("linear_step", linear_step<kX, decltype(grad)::value>, launch, chains, stream, step,
          launch);
    });
  });
}

void fill_noise(const Noise& noise, float* out, int device, cudaStream_t stream) {
  if (noise.chains * noise.elements == 0) return;
  const OnDevice here(device);
  Launch launch = cut(noise.chains, noise.elements, 4);
  launch.aligned = reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0 &&
                   (noise.chains == 1 || noise.elements % 4 == 0);
  run("fill", fill, launch, noise.chains, stream, noise, out, launch);
}

}  // namespace cuda
}  // namespace fastlangevin
