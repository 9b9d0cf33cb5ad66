// The module fastlangevin._native: addresses, sizes and strides in, nothing out. No torch header is
// included, so that one binary serves every version of torch.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "signs_cpu.h"
#include "step_cpu.h"
#ifdef FASTLANGEVIN_CUDA
#include "step_cuda.h"
#endif

namespace py = pybind11;

namespace fastlangevin {
namespace {

void read_sizes(py::handle tuple, int64_t (&sizes)[kMaxDims], int dims) {
  for (int d = 0; d < dims; ++d) {
    sizes[d] = PyLong_AsLongLong(PyTuple_GetItem(tuple.ptr(), d));
  }
  if (PyErr_Occurred()) throw py::error_already_set();
}

// An operand is None or (address, dtype, strides).
Operand read_operand(py::handle value, int dims) {
  Operand operand;
  if (value.is_none()) return operand;
  PyObject* tuple = value.ptr();
  operand.data = PyLong_AsVoidPtr(PyTuple_GetItem(tuple, 0));
  operand.dtype = static_cast<Dtype>(PyLong_AsLong(PyTuple_GetItem(tuple, 1)));
  read_sizes(PyTuple_GetItem(tuple, 2), operand.strides, dims);
  return operand;
}

// A coefficient is a number or (address of float32, stride).
float read_coefficient(py::handle value, const float*& values, int64_t& stride) {
  if (!PyTuple_Check(value.ptr())) return static_cast<float>(PyFloat_AsDouble(value.ptr()));
  values = static_cast<const float*>(PyLong_AsVoidPtr(PyTuple_GetItem(value.ptr(), 0)));
  stride = PyLong_AsLongLong(PyTuple_GetItem(value.ptr(), 1));
  return 1.0f;
}

void langevin_step(py::handle shape, py::handle x, py::handle out, py::handle grad,
                   py::handle noise, py::handle cast, py::handle step_size, py::handle noise_std,
                   bool maximize, float clip, float lo, float hi, bool noise_last, bool clamp_noise,
                   bool draw, uint64_t seed, uint32_t number, uint32_t first_chain, uintptr_t state,
                   int device, uintptr_t stream_or_threads) {
  Step step;
  step.dims = static_cast<int>(PyTuple_Size(shape.ptr()));
  if (step.dims < 1 || step.dims > kMaxDims) {
    throw std::invalid_argument("langevin_step_: x must have 1 to " + std::to_string(kMaxDims) +
                                " dimensions, got " + std::to_string(step.dims));
  }
  read_sizes(shape, step.shape, step.dims);
  step.x = read_operand(x, step.dims);
  step.out = out.is_none() ? step.x : read_operand(out, step.dims);
  step.grad = read_operand(grad, step.dims);
  step.noise = read_operand(noise, step.dims);
  step.cast = read_operand(cast, step.dims);
  step.scale = read_coefficient(step_size, step.scales, step.scales_stride);
  if (!maximize) step.scale = -step.scale;
  step.noise_std = read_coefficient(noise_std, step.noise_stds, step.noise_stds_stride);
  if (PyErr_Occurred()) throw py::error_already_set();
  step.clip = clip, step.lo = lo, step.hi = hi;
  step.noise_last = noise_last, step.clamp_noise = clamp_noise;
  step.draw = draw, step.seed = seed, step.step = number, step.first_chain = first_chain;
  step.state = reinterpret_cast<const int64_t*>(state);
  py::gil_scoped_release unlocked;
  if (device < 0) {
    cpu::langevin_step(step, static_cast<int>(stream_or_threads));
  } else {
#ifdef FASTLANGEVIN_CUDA
    cuda::langevin_step(step, device, reinterpret_cast<cudaStream_t>(stream_or_threads));
#else
    throw std::runtime_error("fastlangevin was built without CUDA");
#endif
  }
}

void fill_noise(uintptr_t out, bool uniform, int64_t chains, int64_t elements, uint64_t seed,
                uint32_t step, uint32_t stream, uint32_t first_chain, int device,
                uintptr_t stream_or_threads) {
  const Noise noise{seed,   step,    stream, first_chain, uniform ? Fill::kUniform : Fill::kNormal,
                    chains, elements};
  float* numbers = reinterpret_cast<float*>(out);
  py::gil_scoped_release unlocked;
  if (device < 0) {
    cpu::fill_noise(noise, numbers, static_cast<int>(stream_or_threads));
  } else {
#ifdef FASTLANGEVIN_CUDA
    cuda::fill_noise(noise, numbers, device, reinterpret_cast<cudaStream_t>(stream_or_threads));
#else
    throw std::runtime_error("fastlangevin was built without CUDA");
#endif
  }
}

void pack_signs(uintptr_t values, int dtype, int64_t count, bool unordered, uintptr_t bits,
                int threads) {
  py::gil_scoped_release unlocked;
  cpu::pack_signs(reinterpret_cast<const void*>(values), static_cast<Dtype>(dtype), count,
                  unordered, reinterpret_cast<uint8_t*>(bits), threads);
}

void apply_signs(uintptr_t grad, int dtype, int64_t count, uintptr_t bits, float slope,
                 int threads) {
  py::gil_scoped_release unlocked;
  cpu::apply_signs(reinterpret_cast<void*>(grad), static_cast<Dtype>(dtype), count,
                   reinterpret_cast<const uint8_t*>(bits), slope, threads);
}

}  // namespace
}  // namespace fastlangevin

PYBIND11_MODULE(_native, module) {
  namespace fl = fastlangevin;
  module.doc() = "fastlangevin's kernels; fastlangevin.kernels.native says what the arguments are";
  module.def("langevin_step", &fl::langevin_step);
  module.def("fill_noise", &fl::fill_noise);
  module.def("pack_signs", &fl::pack_signs);
  module.def("apply_signs", &fl::apply_signs);
  module.def("instruction_set", &fl::cpu::instruction_set);
  module.def("choose_instruction_set", &fl::cpu::choose_instruction_set, py::arg("name"));
  module.attr("MAX_DIMS") = fl::kMaxDims;
#ifdef FASTLANGEVIN_CUDA
  module.attr("CUDA") = true;
  module.def("cuda_reason", &fl::cuda::reason, py::arg("device"));
#else
  module.attr("CUDA") = false;
  module.attr("WHY_NO_CUDA") = FASTLANGEVIN_WHY_NO_CUDA;
#endif
}
