// The module fastlangevin._native. Its functions take addresses, sizes and strides instead of
// tensors. No header of torch is included, so that one binary works with every version of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/chain.h"
#include "cpu/convnet.h"
#include "cpu/huge_pages.h"
#include "cpu/signs.h"
#include "cpu/step.h"
#include "cpu/tile_permission.h"
#include "cpu/tile_plan.h"
#ifdef FASTLANGEVIN_CUDA
#include "cuda/step.h"
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

// The terms of an update that change from step to step.
void read_terms(Step& step, py::handle step_size, py::handle noise_std, bool maximize, bool draw,
                uint32_t number) {
  step.scale = read_coefficient(step_size, step.scales, step.scales_stride);
  if (!maximize) step.scale = -step.scale;
  step.noise_std = read_coefficient(noise_std, step.noise_stds, step.noise_stds_stride);
  if (PyErr_Occurred()) throw py::error_already_set();
  step.draw = draw, step.step = number;
}

void langevin_step(py::handle shape, py::handle x, py::handle grad, py::handle noise,
                   py::handle step_size, py::handle noise_std, bool maximize, float clip, float lo,
                   float hi, bool noise_last, bool draw, uint64_t seed, uint32_t number,
                   uint32_t first_chain, uintptr_t rng_state, int device,
                   uintptr_t stream_or_threads) {
  Step step;
  step.dims = static_cast<int>(PyTuple_Size(shape.ptr()));
  if (step.dims < 1 || step.dims > kMaxDims) {
    throw std::invalid_argument("langevin_step_: x must have 1 to " + std::to_string(kMaxDims) +
                                " dimensions, got " + std::to_string(step.dims));
  }
  read_sizes(shape, step.shape, step.dims);
  step.x = read_operand(x, step.dims);
  step.grad = read_operand(grad, step.dims);
  step.noise = read_operand(noise, step.dims);
  read_terms(step, step_size, noise_std, maximize, draw, number);
  step.clip = clip, step.lo = lo, step.hi = hi;
  step.noise_last = noise_last;
  step.seed = seed, step.first_chain = first_chain;
  step.rng_state = reinterpret_cast<const int64_t*>(rng_state);
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

using Pair = std::array<int32_t, 2>;
// kind, inputs, in, out, size of the output, activation, kernel, stride, padding, dilation,
// factors, groups, and links (out, in, factor)
using LayerTuple =
    std::tuple<int32_t, Pair, int32_t, int32_t, Pair, int32_t, Pair, Pair, Pair, Pair,
               std::array<float, 2>, int32_t, std::vector<std::tuple<int32_t, int32_t, float>>>;

ConvNet plan_convnet(const std::vector<LayerTuple>& tuples, int channels, int height, int width,
                     const std::vector<int32_t>& heads, int32_t operands, int64_t chunk) {
  std::vector<ConvLayer> layers;
  for (const auto& [kind, inputs, in, out, size, activation, kernel, stride, padding, dilation,
                    factors, groups, links] : tuples) {
    layers.push_back({static_cast<LayerKind>(kind),
                      {inputs[0], inputs[1]},
                      in,
                      out,
                      size[0],
                      size[1],
                      static_cast<Activation>(activation),
                      {kernel[0], kernel[1]},
                      {stride[0], stride[1]},
                      {padding[0], padding[1]},
                      {dilation[0], dilation[1]},
                      {factors[0], factors[1]},
                      groups});
    for (const auto& [to, from, factor] : links) layers.back().links.push_back({to, from, factor});
  }
  return cpu::plan_convnet(std::move(layers), channels, height, width, heads,
                           static_cast<Operands>(operands), chunk);
}

// weights, bias, settings of the activation
using WeightsTuple = std::tuple<uintptr_t, uintptr_t, std::array<float, 2>>;

void pack_weights(const ConvNet& net, const std::vector<WeightsTuple>& tuples, uintptr_t packed,
                  int threads) {
  std::vector<cpu::LayerWeights> all;
  for (const auto& [weights, bias, settings] : tuples) {
    all.push_back(
        {reinterpret_cast<const float*>(weights), reinterpret_cast<const float*>(bias), settings});
  }
  py::gil_scoped_release unlocked;
  cpu::pack_weights(net, all, reinterpret_cast<float*>(packed), threads);
}

Convolution plan_convolution(int in, int out, const Pair& size, const Pair& image,
                             const Pair& kernel, const Pair& stride, const Pair& padding,
                             bool gradient) {
  const ConvLayer layer{LayerKind::kConv,
                        {0, -1},
                        in,
                        out,
                        size[0],
                        size[1],
                        Activation::kIdentity,
                        {kernel[0], kernel[1]},
                        {stride[0], stride[1]},
                        {padding[0], padding[1]}};
  return cpu::plan_convolution(layer, image[0], image[1], gradient);
}

void pack_convolution(const Convolution& conv, uintptr_t weights, uintptr_t packed, int threads) {
  py::gil_scoped_release unlocked;
  cpu::pack_convolution(conv, reinterpret_cast<const float*>(weights),
                        reinterpret_cast<float*>(packed), threads);
}

void convolve(const Convolution& conv, int64_t chains, uintptr_t x, uintptr_t packed,
              uintptr_t bias, float leak, uintptr_t out, int threads) {
  py::gil_scoped_release unlocked;
  cpu::convolve(conv,
                {reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(packed),
                 reinterpret_cast<const float*>(bias), leak, reinterpret_cast<float*>(out)},
                chains, threads);
}

// (begin, height, width, stored channels) of each head in the array of all.
std::vector<std::array<int64_t, 4>> head_places(const ConvNet& net) {
  std::vector<std::array<int64_t, 4>> places;
  for (const ConvHead& head : net.heads) {
    const ConvBuffer& buffer = net.buffers[head.value];
    places.push_back({head.begin, buffer.height, buffer.width, buffer.stored});
  }
  return places;
}

// The same of each layer of constants, in those of a chain.
std::vector<std::array<int64_t, 4>> constant_places(const ConvNet& net) {
  std::vector<std::array<int64_t, 4>> places;
  for (size_t k = 0; k < net.layers.size(); ++k) {
    if (net.layers[k].kind != LayerKind::kConstant) continue;
    const ConvBuffer& buffer = net.buffers[k + 1];
    places.push_back({net.plans[k].numbers, buffer.height, buffer.width, buffer.stored});
  }
  return places;
}

// How many passes multiply by tiles.
int tiled_passes(const ConvNet& net) {
  int count = 0;
  for (const LayerPlan& plan : net.plans) {
    for (const ConvPass& pass : plan.forward) count += pass.tiles.used();
    for (const ConvPass& pass : plan.backward) count += pass.tiles.used();
  }
  return count;
}

// chains, chunk, address and strides of x and of the gradient as images, address of the heads'
// weights, offset, addresses of the energies, of the packed weights and of the chains' constants,
// stride of these between chains
using BatchTuple =
    std::tuple<int64_t, int64_t, uintptr_t, std::array<int64_t, 4>, uintptr_t,
               std::array<int64_t, 4>, uintptr_t, float, uintptr_t, uintptr_t, uintptr_t, int64_t>;

ConvBatch read_batch(const ConvNet& net, const BatchTuple& tuple) {
  const auto& [chains, chunk, x, x_strides, grad, grad_strides, head, offset, energies, packed,
               constants, constants_stride] = tuple;
  ConvBatch batch{chains,
                  chunk,
                  reinterpret_cast<const float*>(x),
                  {},
                  reinterpret_cast<float*>(grad),
                  {},
                  reinterpret_cast<const float*>(head),
                  offset,
                  reinterpret_cast<float*>(energies),
                  reinterpret_cast<const float*>(packed),
                  reinterpret_cast<const float*>(constants),
                  constants_stride};
  if (net.kernels->tiles && chunk != net.chunk) {
    throw std::invalid_argument("ConvNet: chunk must be the plan's " + std::to_string(net.chunk) +
                                ", got " + std::to_string(chunk));
  }
  std::copy(x_strides.begin(), x_strides.end(), batch.x_strides);
  std::copy(grad_strides.begin(), grad_strides.end(), batch.grad_strides);
  return batch;
}

void convnet_score(const ConvNet& net, const BatchTuple& operands, uintptr_t workspace,
                   int threads) {
  const ConvBatch batch = read_batch(net, operands);
  py::gil_scoped_release unlocked;
  cpu::convnet_score(net, batch, reinterpret_cast<void*>(workspace), threads);
}

// An update is (whether it follows the gradient, step_size, noise_std, draw, number of the step).
void convnet_chain(const ConvNet& net, const BatchTuple& operands, py::handle shape,
                   py::handle x_strides, py::handle grad_strides, const py::list& updates,
                   bool maximize, float clip, float lo, float hi, bool noise_last, uint64_t seed,
                   uint32_t first_chain, uintptr_t workspace, int threads) {
  const ConvBatch batch = read_batch(net, operands);
  Step all;
  all.dims = static_cast<int>(PyTuple_Size(shape.ptr()));
  read_sizes(shape, all.shape, all.dims);
  all.x.data = const_cast<float*>(batch.x);
  read_sizes(x_strides, all.x.strides, all.dims);
  all.clip = clip, all.lo = lo, all.hi = hi;
  all.noise_last = noise_last;
  all.seed = seed, all.first_chain = first_chain;
  std::vector<Step> steps;
  for (py::handle update : updates) {
    const auto terms = py::reinterpret_borrow<py::tuple>(update);
    Step step = all;
    if (terms[0].cast<bool>()) {
      step.grad.data = batch.grad;
      read_sizes(grad_strides, step.grad.strides, step.dims);
    }
    read_terms(step, terms[1], terms[2], maximize, terms[3].cast<bool>(),
               terms[4].cast<uint32_t>());
    steps.push_back(step);
  }
  py::gil_scoped_release unlocked;
  cpu::convnet_chain(net, batch, steps, reinterpret_cast<void*>(workspace), threads);
}

// A profile function of a thread. `watched` is the pair (owners, called): before a method in C of
// one of the owners runs, called(frame of the caller) does.
int on_profile_event(PyObject* watched, PyFrameObject* frame, int event, PyObject* function) {
  if (event != PyTrace_C_CALL || !PyCFunction_Check(function)) return 0;
  PyObject* owner = PyCFunction_GET_SELF(function);
  PyObject* owners = PyTuple_GET_ITEM(watched, 0);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(owners); ++i) {
    if (PyTuple_GET_ITEM(owners, i) != owner) continue;
    PyObject* result = PyObject_CallFunctionObjArgs(PyTuple_GET_ITEM(watched, 1),
                                                    reinterpret_cast<PyObject*>(frame), nullptr);
    if (result == nullptr) return -1;
    Py_DECREF(result);
    return 0;
  }
  return 0;
}

void watch_methods(py::tuple owners, py::object called) {
  PyEval_SetProfile(&on_profile_event, py::make_tuple(owners, called).ptr());
}

}  // namespace
}  // namespace fastlangevin

PYBIND11_MODULE(_native, module) {
  namespace fl = fastlangevin;
  module.doc() = "fastlangevin's kernels; fastlangevin.kernels.native says what the arguments are";
  module.attr("DTYPES") = py::dict(py::arg("float32") = static_cast<int>(fl::Dtype::kFloat32),
                                   py::arg("bfloat16") = static_cast<int>(fl::Dtype::kBFloat16),
                                   py::arg("float16") = static_cast<int>(fl::Dtype::kFloat16));
  module.attr("ACTIVATIONS") =
      py::dict(py::arg("identity") = static_cast<int>(fl::Activation::kIdentity),
               py::arg("leaky_relu") = static_cast<int>(fl::Activation::kLeakyReLU),
               py::arg("silu") = static_cast<int>(fl::Activation::kSiLU),
               py::arg("sigmoid") = static_cast<int>(fl::Activation::kSigmoid),
               py::arg("softplus") = static_cast<int>(fl::Activation::kSoftplus),
               py::arg("elu") = static_cast<int>(fl::Activation::kELU),
               py::arg("tanh") = static_cast<int>(fl::Activation::kTanh),
               py::arg("gelu") = static_cast<int>(fl::Activation::kGELU),
               py::arg("gelu_tanh") = static_cast<int>(fl::Activation::kGELUTanh));
  module.attr("OPERANDS") =
      py::dict(py::arg("fp32") = static_cast<int>(fl::Operands::kFloat32),
               py::arg("bf16") = static_cast<int>(fl::Operands::kBFloat16),
               py::arg("tf32") = static_cast<int>(fl::Operands::kBFloat16x3),
               py::arg("bf16x6") = static_cast<int>(fl::Operands::kBFloat16x6));
  module.attr("LAYERS") =
      py::dict(py::arg("conv") = static_cast<int>(fl::LayerKind::kConv),
               py::arg("pointwise") = static_cast<int>(fl::LayerKind::kPointwise),
               py::arg("multiply") = static_cast<int>(fl::LayerKind::kMultiply),
               py::arg("mix") = static_cast<int>(fl::LayerKind::kMix),
               py::arg("max_pool") = static_cast<int>(fl::LayerKind::kMaxPool),
               py::arg("logsumexp") = static_cast<int>(fl::LayerKind::kLogSumExp),
               py::arg("norm") = static_cast<int>(fl::LayerKind::kNorm),
               py::arg("transposed") = static_cast<int>(fl::LayerKind::kTransposed),
               py::arg("constant") = static_cast<int>(fl::LayerKind::kConstant));
  module.def("langevin_step", &fl::langevin_step, py::arg("shape"), py::arg("x"), py::arg("grad"),
             py::arg("noise"), py::arg("step_size"), py::arg("noise_std"), py::arg("maximize"),
             py::arg("grad_clip"), py::arg("lo"), py::arg("hi"), py::arg("noise_last"),
             py::arg("draw"), py::arg("seed"), py::arg("step"), py::arg("first_chain"),
             py::arg("rng_state"), py::arg("device"), py::arg("stream_or_threads"));
  module.def("fill_noise", &fl::fill_noise, py::arg("out"), py::arg("uniform"), py::arg("chains"),
             py::arg("elements"), py::arg("seed"), py::arg("step"), py::arg("stream"),
             py::arg("first_chain"), py::arg("device"), py::arg("stream_or_threads"));
  module.def("pack_signs", &fl::pack_signs);
  module.def("apply_signs", &fl::apply_signs);
  py::class_<fl::ConvNet>(module, "ConvNet")
      .def(py::init(&fl::plan_convnet), py::arg("layers"), py::arg("channels"), py::arg("height"),
           py::arg("width"), py::arg("heads"), py::arg("operands"), py::arg("chunk"))
      .def_readonly("packed", &fl::ConvNet::packed)
      .def_readonly("workspace", &fl::ConvNet::workspace)
      .def_readonly("scratch", &fl::ConvNet::scratch)
      .def_readonly("leading", &fl::ConvNet::leading)
      .def_readonly("head_values", &fl::ConvNet::head_values)
      .def_property_readonly("heads", &fl::head_places)
      .def_readonly("constant_values", &fl::ConvNet::constants)
      .def_property_readonly("constants", &fl::constant_places)
      .def_property_readonly("tiled_passes", &fl::tiled_passes)
      .def_property_readonly(
          "instruction_set",
          [](const fl::ConvNet& net) { return fl::cpu::instruction_set(*net.kernels); })
      .def_property_readonly("by_matrix_unit",
                             [](const fl::ConvNet& net) { return net.kernels->tiles; })
      .def_property_readonly("cycles", &fl::cpu::product_cycles)
      .def("pack", &fl::pack_weights)
      .def("score", &fl::convnet_score)
      .def("chain", &fl::convnet_chain, py::arg("operands"), py::arg("shape"), py::arg("x_strides"),
           py::arg("grad_strides"), py::arg("updates"), py::arg("maximize"), py::arg("grad_clip"),
           py::arg("lo"), py::arg("hi"), py::arg("noise_last"), py::arg("seed"),
           py::arg("first_chain"), py::arg("workspace"), py::arg("threads"));
  py::class_<fl::Convolution>(module, "Convolution")
      .def(py::init(&fl::plan_convolution), py::arg("in_channels"), py::arg("out_channels"),
           py::arg("out_size"), py::arg("in_size"), py::arg("kernel"), py::arg("stride"),
           py::arg("padding"), py::arg("gradient"))
      .def_readonly("packed", &fl::Convolution::packed)
      .def_readonly("saving", &fl::Convolution::saving)
      .def("pack", &fl::pack_convolution)
      .def("run", &fl::convolve);
  module.def("ask_for_huge_pages", &fl::cpu::ask_for_huge_pages);
  module.def("watch_methods", &fl::watch_methods);
  module.def("instruction_set", [] { return fl::cpu::instruction_set(); });
  module.def("choose_instruction_set", &fl::cpu::choose_instruction_set, py::arg("name"));
  module.def("matrix_unit", [] { return fl::cpu::conv_kernels(fl::Operands::kBFloat16).tiles; });
  module.def("bfloat16_is_faster", &fl::cpu::bfloat16_is_faster);
  module.def("why_no_amx", [] {
    fl::cpu::conv_kernels(
        fl::Operands::kBFloat16);  // changes the instruction set if the system refuses tiles
    const char* reason = fl::cpu::why_no_tiles();
    return std::string(reason ? reason : "");
  });
  module.attr("MAX_DIMS") = fl::kMaxDims;
#ifdef FASTLANGEVIN_CUDA
  module.attr("CUDA") = true;
  module.def("cuda_reason", &fl::cuda::reason, py::arg("device"));
#else
  module.attr("CUDA") = false;
  module.attr("WHY_NO_CUDA") = FASTLANGEVIN_WHY_NO_CUDA;
#endif
}
