// A stack of convolutions and activations with a linear head, and how its input gradient is
// computed: as passes over buffers of a few chains each.
//
// Buffers hold pixels with their channels next to each other (padded to whole vectors) inside a
// frame of zeros wide enough for every convolution that reads them, so that no pass ever tests
// for an edge. A convolution and its input gradient are then the same thing, a Pass: every output
// pixel is a sum, over some fixed offsets ("taps") from an input pixel, of channels times a matrix.
// The input gradient of a convolution of stride s is s x s passes, one for each residue of the
// pixel's position, each with the taps that reach it: no product with an inserted zero.
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
  float settings[2];  // the leak; beta and threshold of softplus; alpha of elu
};

// What a thread keeps of one value of the net (its input, or the output of a layer), for each chain
// of its chunk. Addresses are in elements from the start of the thread's workspace, and
// multiplied by the chains of a chunk.
struct ConvBuffer {
  int32_t height, width, channels;
  int32_t top = 0, left = 0, bottom = 0, right = 0;  // the frame
  int64_t pixel = 0, row = 0, chain = 0;             // strides
  int64_t values = 0, slopes = -1;  // where they begin; slopes: the derivatives of a smooth activation

  int64_t at(int64_t y, int64_t x) const { return (y + top) * row + (x + left) * pixel; }
};

struct ConvPass {
  int64_t in, out;               // channels
  std::vector<int32_t> from, to;  // for every pixel of a chain, where it reads and where it writes
  std::vector<int32_t> taps;
  std::vector<int32_t> rows;      // the kernel's positions in their order, ky * kw + kx
  int64_t steps = 0;              // words multiplied from every tap on: of channels, and of several
                                  // positions where those lie next to each other
  int64_t weights = 0;            // where its packed weights begin, in words
};

// An input gradient of so few channels that vectors of them would be mostly padding. The products
// of a pixel of the output with all kernel positions are computed side by side as if they were
// channels, in float32; from there every pixel of the input collects its own.
struct ConvSpread {
  ConvPass products;
  int64_t pixel = 0;   // from one pixel's products to the next one's; 0 where nothing is spread
  int64_t values = 0;  // of one chain, in a frame as the output has
};

struct ConvNet {
  const cpu::ConvKernels* kernels;  // those that it is laid out for
  bool bfloat16;                    // values and weights, else float32
  std::vector<ConvLayer> layers;
  std::vector<ConvBuffer> buffers;  // layers + 1
  std::vector<ConvPass> forward;
  std::vector<std::vector<ConvPass>> backward;
  ConvSpread spread;                // the first layer's; its passes then only collect
  std::vector<int64_t> biases;      // where each layer's bias begins among the packed weights
  int64_t packed = 0;               // 32-bit words of all weights and biases as the kernels read them
  int64_t workspace = 0;            // bytes that one chain needs of a thread's workspace
  int64_t scratch = 0;              // and that a thread needs behind those of its chains
};

// One call's operands. The gradient, and the energies where asked for, are written.
struct ConvBatch {
  int64_t chains, chunk;
  const float* x;
  int64_t x_strides[4];
  float* grad;
  int64_t grad_strides[4];
  const float* head;  // [height, width, channels]: the gradient of the energy there
  float offset;       // energy = <features, head> + offset
  float* energies;    // or null
  const float* packed;
};

}  // namespace fastlangevin
