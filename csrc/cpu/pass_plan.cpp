// Plans the passes of single layers.
#include "cpu/pass_plan.h"

#include <algorithm>

#include "cpu/winograd_plan.h"

namespace fastlangevin {
namespace cpu {
namespace {

// The position of the first tap of output o along an axis of a layer.
int first_read(const ConvLayer& layer, int axis, int o) {
  return o * layer.stride[axis] - layer.padding[axis];
}

// The kernel positions that reach an input position with this residue modulo the stride, and the
// outputs from which they do, counted from position / stride.
struct Reach {
  int kernel, offset;
};

std::vector<Reach> reaches(const ConvLayer& layer, int axis, int residue) {
  std::vector<Reach> reaching;
  for (int k = 0; k < layer.kernel[axis]; ++k) {
    const int distance = residue + layer.padding[axis] - k * layer.dilation[axis];
    if (distance % layer.stride[axis] == 0) reaching.push_back({k, distance / layer.stride[axis]});
  }
  std::reverse(reaching.begin(), reaching.end());  // in the order of memory
  return reaching;
}

// Widens a frame until positions first..last of an axis are inside it.
void widen(int32_t& before, int32_t& after, int extent, int first, int last) {
  before = std::max(before, -first);
  after = std::max(after, last - (extent - 1));
}

// Whether all of a convolution's input is one window, so that no gradient is a sum over outputs.
bool one_output(const ConvLayer& layer) { return layer.height == 1 && layer.width == 1; }

// Whether the taps of every phase along an axis are adjacent.
bool adjacent(const ConvLayer& layer, int axis) {
  return layer.dilation[axis] == 1 || layer.kernel[axis] == 1;
}

// The taps of each phase of a convolution along an axis, or 0 if they differ or are not adjacent.
int phase_taps(const ConvLayer& layer, int axis) {
  const int kernel = layer.kernel[axis], stride = layer.stride[axis];
  return kernel % stride == 0 && adjacent(layer, axis) ? kernel / stride : 0;
}

}  // namespace

void widen_frames(const ConvLayer& layer, ConvBuffer& in, ConvBuffer& out) {
  for (int axis = 0; axis < 2; ++axis) {
    const int inputs = axis ? in.width : in.height, results = axis ? out.width : out.height;
    const int tiled_results = covered(results, phase_taps(layer, axis));
    const int last = first_read(layer, axis, tiled_results - 1) +
                     layer.dilation[axis] * (layer.kernel[axis] - 1);
    widen(axis ? in.left : in.top, axis ? in.right : in.bottom, inputs, first_read(layer, axis, 0),
          last);
    if (one_output(layer)) continue;
    for (int residue = 0; residue < std::min(layer.stride[axis], inputs); ++residue) {
      const std::vector<Reach> all = reaches(layer, axis, residue);
      const int pixels = (inputs - 1 - residue) / layer.stride[axis] + 1;
      for (const Reach& reach : all) {
        widen(axis ? out.left : out.top, axis ? out.right : out.bottom, results, reach.offset,
              covered(pixels, all.size()) - 1 + reach.offset);
      }
    }
  }
}

ConvPass plan_forward(const ConvLayer& layer, const ConvBuffer& in, const ConvBuffer& out,
                      int lanes) {
  ConvPass pass{layer.in, layer.out};
  for (int y = 0; y < out.height; ++y) {
    for (int x = 0; x < out.width; ++x) {
      pass.from.push_back(in.at(first_read(layer, 0, y), first_read(layer, 1, x)));
      pass.to.push_back(out.at(y, x));
    }
  }
  for (int y = 0; y < layer.kernel[0]; ++y) {
    for (int x = 0; x < layer.kernel[1]; ++x) {
      pass.taps.push_back(in.distance(in.residue(first_read(layer, 1, 0)), y * layer.dilation[0],
                                      x * layer.dilation[1]));
      pass.rows.push_back(y * layer.kernel[1] + x);
    }
  }
  if (lanes > 0) {
    plan_tiles({{out.height, out.width},
                {phase_taps(layer, 0), phase_taps(layer, 1)},
                {layer.stride[0], layer.stride[1]},
                {static_cast<int32_t>(in.row), static_cast<int32_t>(in.pixel)}},
               lanes, pass);
  }
  return pass;
}

namespace {

// The passes to the input of a convolution with one output: every pixel has its own weights.
std::vector<ConvPass> plan_scatter(const ConvLayer& layer, const ConvBuffer& in,
                                   const ConvBuffer& out) {
  std::vector<ConvPass> passes;
  for (int y = 0; y < in.height; ++y) {
    for (int x = 0; x < in.width; ++x) {
      const int down = y + layer.padding[0], along = x + layer.padding[1];
      ConvPass pass{layer.out, layer.in};
      pass.from = {static_cast<int32_t>(out.at(0, 0))};
      pass.to = {static_cast<int32_t>(in.at(y, x))};
      pass.y = {y}, pass.x = {x};
      const int ky = down / layer.dilation[0], kx = along / layer.dilation[1];
      if (down % layer.dilation[0] == 0 && along % layer.dilation[1] == 0 && ky < layer.kernel[0] &&
          kx < layer.kernel[1]) {
        pass.taps = {0};
        pass.rows = {ky * layer.kernel[1] + kx};
      }
      passes.push_back(std::move(pass));
    }
  }
  return passes;
}

}  // namespace

std::vector<ConvPass> plan_backward(const ConvLayer& layer, const ConvBuffer& in,
                                    const ConvBuffer& out, int lanes) {
  if (one_output(layer)) return plan_scatter(layer, in, out);
  std::vector<ConvPass> passes;
  for (int ry = 0; ry < std::min(layer.stride[0], in.height); ++ry) {
    for (int rx = 0; rx < std::min(layer.stride[1], in.width); ++rx) {
      ConvPass pass{layer.out, layer.in};
      for (int y = ry; y < in.height; y += layer.stride[0]) {
        for (int phase = 0; phase < out.phases; ++phase) {
          const int first = rx + phase * layer.stride[1], step = out.phases * layer.stride[1];
          for (int x = first; x < in.width; x += step) {
            pass.from.push_back(out.at(y / layer.stride[0], x / layer.stride[1]));
            pass.to.push_back(in.at(y, x));
            pass.y.push_back(y), pass.x.push_back(x);
            if (out.phases > 1) pass.residues.push_back(out.residue(x / layer.stride[1]));
          }
        }
      }
      const std::vector<Reach> downs = reaches(layer, 0, ry), alongs = reaches(layer, 1, rx);
      pass.phases = out.phases;
      for (int residue = 0; residue < out.phases; ++residue) {
        for (const Reach& down : downs) {
          for (const Reach& along : alongs) {
            pass.taps.push_back(out.distance(residue, down.offset, along.offset));
            if (residue == 0) pass.rows.push_back(down.kernel * layer.kernel[1] + along.kernel);
          }
        }
      }
      if (lanes > 0 && adjacent(layer, 0) && adjacent(layer, 1)) {
        plan_tiles({{(in.height - 1 - ry) / layer.stride[0] + 1,
                     (in.width - 1 - rx) / layer.stride[1] + 1},
                    {static_cast<int32_t>(downs.size()), static_cast<int32_t>(alongs.size())},
                    {1, 1},
                    {static_cast<int32_t>(out.row), static_cast<int32_t>(out.pixel)}},
                   lanes, pass);
      }
      passes.push_back(std::move(pass));
    }
  }
  return passes;
}

std::vector<int> quad_reach(const ConvLayer& layer, int axis) {
  std::vector<int> distances;
  for (int pixel = 0; pixel < 2; ++pixel) {
    for (int k = 0; k < layer.kernel[axis]; ++k) {
      distances.push_back(pixel + layer.padding[axis] - k * layer.dilation[axis]);
    }
  }
  std::sort(distances.begin(), distances.end());
  distances.erase(std::unique(distances.begin(), distances.end()), distances.end());
  return distances;
}

bool fits_quads(const ConvLayer& layer, const ConvBuffer& in, int64_t columns) {
  const bool whole = in.height % 2 == 0 && in.width % 2 == 0 && layer.stride[0] == 1 &&
                     layer.stride[1] == 1 && !one_output(layer) && 4 * layer.in <= columns;
  const size_t taps = quad_reach(layer, 0).size() * quad_reach(layer, 1).size();
  return whole && taps < 4 * size_t(layer.kernel[0]) * layer.kernel[1];
}

ConvPass plan_quads(const ConvLayer& layer, const ConvBuffer& in, const ConvBuffer& out) {
  ConvPass pass{layer.out, 4 * layer.in};
  pass.quads = true, pass.phases = out.phases;
  for (int y = 0; y < in.height; y += 2) {
    for (int x = 0; x < in.width; x += 2) {
      pass.from.push_back(out.at(y, x)), pass.to.push_back(in.at(y, x));
      if (out.phases > 1) pass.residues.push_back(out.residue(x));
    }
  }
  for (int residue = 0; residue < out.phases; ++residue) {
    for (const int down : quad_reach(layer, 0)) {
      for (const int along : quad_reach(layer, 1)) {
        if (residue == 0) pass.rows.push_back(pass.taps.size());
        pass.taps.push_back(out.distance(residue, down, along));
      }
    }
  }
  return pass;
}

std::vector<float> quad_weights(const ConvLayer& layer, const float* weights) {
  const std::vector<int> downs = quad_reach(layer, 0), alongs = quad_reach(layer, 1);
  const int64_t taps = downs.size() * alongs.size(), kernel = layer.kernel[0] * layer.kernel[1];
  std::vector<float> all(int64_t{layer.out} * 4 * layer.in * taps, 0.0f);
  // The kernel's position that reaches a pixel from an output at this distance, or -1.
  const auto position = [&](int axis, int pixel, int distance) {
    const int reach = pixel + layer.padding[axis] - distance, k = reach / layer.dilation[axis];
    return reach >= 0 && reach % layer.dilation[axis] == 0 && k < layer.kernel[axis] ? k : -1;
  };
  for (int64_t o = 0; o < layer.out; ++o) {
    for (int64_t c = 0; c < 4 * layer.in; ++c) {
      const int pixel = static_cast<int>(c / layer.in);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int ky = position(0, pixel / 2, downs[tap / alongs.size()]);
        const int kx = position(1, pixel % 2, alongs[tap % alongs.size()]);
        if (ky < 0 || kx < 0) continue;
        all[(o * 4 * layer.in + c) * taps + tap] =
            weights[(o * layer.in + c % layer.in) * kernel + ky * layer.kernel[1] + kx];
      }
    }
  }
  return all;
}

void plan_steps(const ConvBuffer& in, int step, ConvPass& pass) {
  const int channels = static_cast<int>(round_up(pass.in, step));
  pass.steps = channels / step;
  if (in.chain <= in.pixel) return;
  const std::vector<int32_t> taps = std::move(pass.taps);
  const auto runs_of = [&](size_t run) {
    for (size_t k = 0; k < taps.size(); ++k) {
      if (k % run != 0 && taps[k] != taps[k - 1] + channels) return false;
    }
    return taps.size() % run == 0;
  };
  size_t run = std::max<size_t>(1, taps.size());
  while (!runs_of(run)) --run;
  pass.taps.clear();
  for (size_t k = 0; k < taps.size(); k += run) pass.taps.push_back(taps[k]);
  pass.steps = static_cast<int64_t>(run) * channels / step;
}

void plan_spread(const ConvLayer& layer, const ConvBuffer& out, int lanes,
                 std::vector<ConvPass>& passes, ConvSpread& spread) {
  const int positions = layer.kernel[0] * layer.kernel[1];
  const int64_t pixel = round_up(positions * layer.in + 3, lanes);  // read four at a time
  int64_t multiplied = 0;
  for (const ConvPass& pass : passes) {
    multiplied +=
        static_cast<int64_t>(pass.to.size() * pass.rows.size()) * round_up(layer.in, lanes);
  }
  if (out.height * out.width * pixel >= multiplied) return;
  spread.pixel = pixel;
  spread.values = out.chain / out.pixel * pixel;
  spread.products = {layer.out, positions * layer.in};
  spread.products.taps = spread.products.rows = {0};
  for (int y = 0; y < out.height; ++y) {
    for (int x = 0; x < out.width; ++x) {
      spread.products.from.push_back(out.at(y, x));
      spread.products.to.push_back(out.at(y, x) / out.pixel * pixel);
    }
  }
  for (ConvPass& pass : passes) {
    for (int32_t& from : pass.from) from = from / out.pixel * pixel;
    for (size_t t = 0; t < pass.taps.size(); ++t) {
      pass.taps[t] = pass.taps[t] / out.pixel * pixel + pass.rows[t] * layer.in;
    }
  }
}

MixPass plan_mix(const std::vector<PixelLink>& links, const ConvBuffer& in, const ConvBuffer& out) {
  MixPass pass;
  size_t next = 0;
  for (int pixel = 0; pixel < out.height * out.width; ++pixel) {
    pass.to.push_back(out.at(pixel / out.width, pixel % out.width));
    pass.begin.push_back(pass.from.size());
    for (; next < links.size() && links[next].out == pixel; ++next) {
      pass.from.push_back(in.at(links[next].in / in.width, links[next].in % in.width));
      pass.factors.push_back(links[next].factor);
    }
  }
  pass.begin.push_back(pass.from.size());
  return pass;
}

std::vector<PixelLink> reversed(std::vector<PixelLink> links) {
  for (PixelLink& link : links) std::swap(link.out, link.in);
  std::stable_sort(links.begin(), links.end(),
                   [](const PixelLink& a, const PixelLink& b) { return a.out < b.out; });
  return links;
}

}  // namespace cpu
}  // namespace fastlangevin
