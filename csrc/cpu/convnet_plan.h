// A plan for the input gradient of a stack of convolutions and activations with a linear head, as
// passes over buffers of a few chains each.
//
// A buffer stores the channels of a pixel next to each other, padded to whole vectors, inside a
// frame of zeros that is wide enough for every convolution that reads it. No pass therefore tests
// for an edge, and a convolution and its input gradient have the same form, a Pass: every output
// pixel is a sum, over fixed offsets ("taps") from an input pixel, of channels times a matrix. The
// input gradient of a convolution of stride s takes s x s passes, one for each residue of the
// pixel's position, each with the taps that reach it and without products with inserted zeros.
#pragma once

#include <cstdint>
#include <vector>

namespace fastlangevin {

namespace cpu {
struct ConvKernels;
}

enum class Activation : int32_t { kLeakyReLU, kSiLU, kSoftplus, kELU, kTanh };

struct ConvLayer {
  int32_t in, out;  // channels
  int32_t kernel[2], stride[2], padding[2], dilation[2];
  Activation activation;
  float settings[2];  // leak of leaky_relu; beta and threshold of softplus; alpha of elu
};

// Where a thread stores the input of the net or the output of a layer, for each chain of its chunk.
// Addresses count elements from the start of the thread's workspace and are to be multiplied by the
// number of chains in a chunk.
struct ConvBuffer {
  int32_t height, width, channels;
  int32_t top = 0, left = 0, bottom = 0, right = 0;  // the frame
  int64_t pixel = 0, row = 0, chain = 0;             // strides
  int64_t values = 0;   // where the values begin
  int64_t slopes = -1;  // where the derivatives of a smooth activation begin

  int64_t at(int64_t y, int64_t x) const { return (y + top) * row + (x + left) * pixel; }
};

struct ConvPass {
  int64_t in, out;               // channels
  std::vector<int32_t> from{}, to{};  // where every pixel of a chain reads and where it writes
  std::vector<int32_t> taps{};
  std::vector<int32_t> rows{};    // the kernel's positions ky * kw + kx, in order
  int64_t steps = 0;              // words to multiply from each tap on: those of its channels, and
                                  // of further positions that are adjacent in memory
  int64_t weights = 0;            // where the packed weights begin, in words
};

// An input gradient with so few channels that vectors of them would consist mostly of padding. The
// products of an output pixel with all kernel positions are computed as if they were channels, in
// float32. Every input pixel then collects its own products from there.
struct ConvSpread {
  ConvPass products;
  int64_t pixel = 0;   // stride between the products of two pixels; 0 if nothing is spread
  int64_t values = 0;  // elements of one chain, in a frame like that of the output
};

struct ConvNet {
  const cpu::ConvKernels* kernels;  // the kernels that the plan is for
  bool bfloat16;                    // whether values and weights are bfloat16 instead of float32
  std::vector<ConvLayer> layers;
  std::vector<ConvBuffer> buffers;  // layers + 1
  std::vector<ConvPass> forward;
  std::vector<std::vector<ConvPass>> backward;
  ConvSpread spread;                // of the first layer, whose passes then only collect
  std::vector<int64_t> biases;      // where each layer's bias begins in the packed weights
  int64_t packed = 0;               // size of all packed weights and biases in 32-bit words
  int64_t workspace = 0;            // bytes of a thread's workspace for each of its chains
  int64_t scratch = 0;              // further bytes of a thread's workspace, after its chains
};

// The operands of one call. It writes the gradient and, if requested, the energies.
struct ConvBatch {
  int64_t chains, chunk;
  const float* x;
  int64_t x_strides[4];
  float* grad;
  int64_t grad_strides[4];
  const float* head;  // [height, width, channels], the gradient of the energy at the features
  float offset;       // energy = <features, head> + offset
  float* energies;    // or null
  const float* packed;
};

}  // namespace fastlangevin
