// A plan for the energy and input gradient of a network of layers, as passes over buffers of a few
// chains each.
//
// A buffer stores the channels of a pixel next to each other, padded to whole vectors, inside a
// frame of zeros that is wide enough for every convolution that reads it. No pass therefore tests
// for an edge, and a convolution and its input gradient have the same form, a ConvPass: every
// output pixel is a sum, over fixed offsets ("taps") from an input pixel, of channels times a
// matrix. The input gradient of a convolution of stride s takes s x s passes, one for each residue
// of the pixel's position, each with the taps that reach it and without products with inserted
// zeros.
//
// A vector [D] is an image of D channels and one pixel, and a linear layer is a convolution whose
// kernel has the size of its input.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastlangevin {

namespace cpu {
struct ConvKernels;
}

enum class Activation : int32_t {
  kIdentity,
  kLeakyReLU,
  kSiLU,
  kSigmoid,
  kSoftplus,
  kELU,
  kTanh,
  kGELU,
  kGELUTanh
};

enum class LayerKind : int32_t {
  kConv,        // products with weights [out, in, kernel]
  kPointwise,   // weights[channel] a + factor b, for inputs a and b (or a alone)
  kMultiply,    // a b
  kMix,         // every pixel is a sum of factors times input pixels, for each channel alone
  kMaxPool,     // every pixel is the greatest of some input pixels, for each channel alone
  kLogSumExp,   // of all channels and pixels
  kNorm,        // weights[channel] (a - mean) / sqrt(variance + factor), over groups of channels
  kTransposed,  // the input gradient of a convolution with weights [in, out, kernel]
  kConstant,    // numbers of each chain that the caller passes; it reads no value
};

// One input pixel of an output pixel, for kMix and kMaxPool. Pixels are numbered y * width + x. The
// factor of kMaxPool is the number of the window's position, in the order of search.
struct PixelLink {
  int32_t out, in;
  float factor;
};

// A layer adds a bias [out] and applies an activation to its result, except kConstant. The second
// input of kMultiply and kPointwise may be a constant of one pixel, which belongs to all pixels.
struct ConvLayer {
  LayerKind kind;
  int32_t inputs[2];      // values: 0 is the state and k + 1 the output of layer k; -1 is none
  int32_t in, out;        // channels
  int32_t height, width;  // of the output
  Activation activation;
  int32_t kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
  float factors[2] = {1, 1};  // of a, if it has no weights, and of b; eps of kNorm is the first
  int32_t groups = 1;         // of kNorm
  std::vector<PixelLink> links{};  // in the order of output pixels
};

// Where a thread stores a value, for each chain of its chunk. Addresses count elements from the
// start of the thread's workspace and are to be multiplied by the number of chains in a chunk.
struct ConvBuffer {
  int32_t height, width, channels;
  int32_t top = 0, left = 0, bottom = 0, right = 0;  // the frame
  int64_t stored = 0;                                // channels with their padding
  int64_t pixel = 0, row = 0, chain = 0;             // strides
  int64_t size = 0;                                  // of the memory for each chain
  int64_t values = 0;
  int64_t grads = 0;        // the gradient before the activation; may take the place of the values
  int64_t slopes = -1;      // the derivatives of a smooth activation
  int64_t signs = -1;       // bits for leaky ReLU, where the values are those of one part
  int64_t choices = -1;     // the positions that a maximum was found at
  int64_t statistics = -1;  // of kNorm, in float32: the mean and scale of every channel
  bool of_part = false;     // the values and gradients are those of one part of a chunk at a time
  int64_t part = 0;         // elements between the parts of a chunk in all that is kept of them

  // Columns are in groups of the same residue modulo this, so that those that a convolution of this
  // stride reads for neighbouring outputs are next to each other.
  int32_t phases = 1;

  int64_t place(int64_t column) const {
    return phases == 1 ? column : column % phases * (row / pixel / phases) + column / phases;
  }
  int64_t at(int64_t y, int64_t x) const { return (y + top) * row + place(x + left) * pixel; }
  int64_t residue(int64_t x) const { return (x + left) % phases; }
  // How far a pixel is from one whose column has this residue.
  int64_t distance(int64_t residue, int64_t down, int64_t along) const {
    const int64_t column = residue + int64_t{phases} * (1 << 20);
    return down * row + (place(column + along) - place(column)) * pixel;
  }
};

// A pass by S. Winograd's minimal filtering (A. Lavin and S. Gray, "Fast Algorithms for
// Convolutional Neural Networks", 2016). Along an axis, F(n, r) computes n outputs of r taps from
// n + r - 1 products, where n r are needed otherwise: the inputs of a tile and the weights are
// transformed by sums, multiplied one by one, and transformed back.
//
// A convolution of stride s is a sum of s x s convolutions of stride 1 ("phases") over every s-th
// pixel. The products of all phases are added before they are transformed back.
struct WinogradTiles {
  static constexpr int kMost = 96;  // tiles that are multiplied together, with 4 outputs each
  int32_t outputs[2] = {1, 1}, taps[2] = {1, 1};  // n and r of each axis
  int32_t step[2] = {0, 0};                       // strides between the inputs of a phase
  std::vector<int32_t> from{};                    // where the inputs of every tile begin
  std::vector<int32_t> to{};      // the outputs of every tile; -1 is outside of the image
  std::vector<int32_t> phases{};  // where the inputs of each phase begin, from those of the tile
  std::vector<int32_t> rows{};    // the kernel's positions [phase][taps[0]][taps[1]]
  int64_t row = 0;                // numbers of a tile's transformed input, for each product
  int64_t block = 0;              // tiles that are multiplied together
  double saving = 0;              // the part of the time of direct products that it takes less

  bool used() const { return !from.empty(); }
  int products() const { return (outputs[0] + taps[0] - 1) * (outputs[1] + taps[1] - 1); }
};

// A pass by tiles of a matrix unit (cpu/tiles.h). The rows of a tile are output pixels of some
// chains, whose inputs are a constant stride apart. The words of a tap are multiplied in parts of
// pass.steps words, and pass.taps says where each part begins. Where the words do not fill the last
// part, it begins early, and its weights are zero for what the part before it has multiplied.
struct MatrixTiles {
  int64_t rows = 0, stride = 0;  // of every tile
  std::vector<int64_t> from{};   // where the first row of each tile reads
  std::vector<int64_t> taps{};   // where the taps of each tile's residue begin in pass.taps
  std::vector<int64_t> to{};     // where each row writes; -1 if the tile before it has it, too
  std::vector<int32_t> chain{};  // of each row
  int64_t words = 0;             // of a tap
  int64_t again = 0;             // words of a tap that its last part begins early by
  int64_t planes = 1;            // bfloat16 numbers that a weight is the sum of
};

// How many products of two numbers, each the sum of this many bfloat16 numbers, are computed: all
// but those that are too small to change the result.
constexpr int64_t plane_products(int64_t planes) { return planes * (planes + 1) / 2; }

struct ConvPass {
  int64_t in, out;                    // channels
  std::vector<int32_t> from{}, to{};  // where every pixel of a chain reads and where it writes
  std::vector<int32_t> y{}, x{};      // of an input gradient: the pixel that it writes
  std::vector<int32_t> taps{};        // for each residue
  std::vector<int32_t> residues{};    // of every pixel; all 0 if this is empty
  int32_t phases = 1;                 // how many residues there are
  std::vector<int32_t> rows{};        // the kernel's positions ky * kw + kx, in order
  int64_t steps = 0;      // words to multiply from each tap on: those of its channels, and
                          // of further positions that are adjacent in memory
  bool quads = false;     // writes 2 x 2 pixels, whose channels it computes as if of one
  int64_t weights = 0;    // where the packed weights begin, in words
  WinogradTiles tiles{};  // if they are used, taps, rows and steps are not
  MatrixTiles matrix{};   // of kernels for a matrix unit

  int64_t tap_count() const { return taps.size() / phases; }  // of one residue
};

// An input gradient with so few channels that vectors of them would consist mostly of padding. The
// products of an output pixel with all kernel positions are computed as if they were channels, in
// float32. Every input pixel then collects its own products from there.
struct ConvSpread {
  ConvPass products;
  int64_t pixel = 0;   // stride between the products of two pixels; 0 if nothing is spread
  int64_t values = 0;  // elements of one chain, in a frame like that of the output
};

// The pixels that kMix and kMaxPool read, forward or backward. Pixel k writes to `to[k]` and reads
// the places begin[k] to begin[k + 1] of `from` and `factors`.
struct MixPass {
  std::vector<int32_t> to{}, begin{}, from{};
  std::vector<float> factors{};
};

// How the gradient of a value receives a part from a layer that reads it. The parts arrive in the
// reverse order of the layers.
struct Arrival {
  bool add = false;   // another part is there already
  bool last = false;  // no part follows, so that the activation's derivative is multiplied by
};

struct LayerPlan {
  std::vector<ConvPass> forward{}, backward{};
  MixPass mix{}, mix_back{};
  Arrival arrivals[2];
  // Where these begin in the packed weights: the bias, the weights of kPointwise and kNorm, and two
  // settings of the activation (leak of leaky_relu; beta of silu; beta and threshold of softplus;
  // alpha of elu).
  int64_t bias = 0, factors = 0, settings = 0;
  int64_t numbers = 0;  // where those of kConstant [height, width, pixel] begin in a chain's
};

// A value that the energy contains a linear function of.
struct ConvHead {
  int32_t value;
  int64_t begin = 0;  // where its weights [height, width, pixel] begin in those of all heads
  Arrival arrival{};
};

// What the products of a network multiply. Sums are float32.
enum class Operands : int32_t {
  kFloat32,
  kBFloat16,    // values and weights that are stored in bfloat16
  kBFloat16x3,  // float32 numbers as sums of two of bfloat16, in three products
  kBFloat16x6,  // float32 numbers as sums of three of bfloat16, in six products
};

struct ConvNet {
  const cpu::ConvKernels* kernels;  // the kernels that the plan is for
  Operands operands;
  int64_t chunk;   // the chains of a chunk, which a layout for tiles depends on
  int64_t part;    // the chains of a chunk that the leading layers take at a time
  size_t leading;  // how many layers these are; 0 if all layers take a whole chunk
  int64_t planes;  // bfloat16 numbers that tiles split a number into
  std::vector<ConvLayer> layers;
  std::vector<ConvBuffer> buffers;  // of the state and of every layer's output
  std::vector<LayerPlan> plans;     // of every layer
  std::vector<ConvHead> heads;
  bool direct = false;      // only the first layer reads the state, and it is a convolution
  ConvSpread spread{};      // of the first layer, whose passes then only collect
  int64_t packed = 0;       // size of all packed weights in 32-bit words
  int64_t head_values = 0;  // size of the weights of all heads
  int64_t constants = 0;    // how many numbers a chain has in all layers of kConstant
  int64_t workspace = 0;    // bytes of a thread's workspace for each of its chains
  int64_t scratch = 0;      // further bytes of a thread's workspace, after its chains
};

// One convolution of images in memory [n, height, width, channels] or, if it is a `gradient`, the
// input gradient of one, which is what a transposed convolution computes.
struct Convolution {
  const cpu::ConvKernels* kernels;
  ConvLayer layer;
  bool gradient;
  ConvBuffer read{}, written{};  // what is read is copied into a frame
  std::vector<ConvPass> passes{};
  int64_t packed = 0;   // size of the packed weights in words
  int64_t scratch = 0;  // numbers of a thread, after the frames of its chains
  double saving = 0;    // the part of the time of direct products that tiles take less
};

// The operands of one convolution: result = f(sums + bias), where f(z) is z, or leak z below 0.
struct ConvolutionBatch {
  const float *x, *packed, *bias;  // the bias may be null
  float leak;
  float* out;
};

// The operands of one call. It writes the gradient and, if requested, the energies.
struct ConvBatch {
  int64_t chains, chunk;
  const float* x;
  int64_t x_strides[4];
  float* grad;
  int64_t grad_strides[4];
  const float* head;  // the gradients of the energy at the heads' values
  float offset;       // energy = sum of <value, head> + offset
  float* energies;    // or null
  const float* packed;
  const float* constants = nullptr;  // [chains, net.constants]
  int64_t constants_stride = 0;      // between chains: net.constants, or 0 if all have the same
};

}  // namespace fastlangevin
