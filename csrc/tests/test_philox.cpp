// The random numbers: the known answers of Random123, and all radii and angles.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "common/philox.h"

using namespace fastlangevin;

namespace {

void known_answers() {
  struct Case {
    uint32_t counter[4];
    uint64_t key;
    uint32_t words[4];
  };
  const Case cases[] = {
      {{0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{~0u, ~0u, ~0u, ~0u}, ~uint64_t{0}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       0x299f31d0a4093822,
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Case& c : cases) {
    uint32_t w[4] = {c.counter[0], c.counter[1], c.counter[2], c.counter[3]};
    philox<Scalar>(w, KeySchedule<Scalar>(c.key));
    for (int k = 0; k < 4; ++k) CHECK(w[k] == c.words[k]);
  }
}

// A normal is a radius times a sine or cosine, so that bounds of their errors bound its error. The
// low byte of a word must have no effect.
void every_argument() {
  const double two_pi = 2 * std::acos(-1.0);
  const uint32_t unit_radius = 0x9b4597e4;  // sqrt(-2 ln v) is nearly 1
  const double unit = radius<Scalar>(unit_radius);
  double radius_error = 0, angle_error = 0;
  for (uint32_t k = 0; k < 1u << 24; ++k) {
    const uint32_t w = k << 8 | (k * 2654435761u >> 24);
    CHECK(uniform<Scalar>(w) == k * 0x1p-24f);
    const double exact = std::sqrt(-2 * std::log((k + 1) * 0x1p-24));
    radius_error = std::max(radius_error, std::fabs(radius<Scalar>(w) - exact));
    float z0, z1;
    box_muller<Scalar>(unit_radius, w, z0, z1);
    const double angle = two_pi * k * 0x1p-24;
    angle_error = std::max(angle_error, std::fabs(z0 - unit * std::cos(angle)) / unit);
    angle_error = std::max(angle_error, std::fabs(z1 - unit * std::sin(angle)) / unit);
  }
  std::printf("radius within %.3g, sine and cosine within %.3g\n", radius_error, angle_error);
  CHECK(radius_error < 4.6e-7);
  CHECK(angle_error < 2.7e-7);  // 2.1e-7, plus the rounding of the product
  CHECK(radius_error + 5.7682 * angle_error < 2.0e-6);
}

}  // namespace

int main() {
  known_answers();
  every_argument();
}
