// The CPU step: conversions of all values, and equality over instruction sets and thread counts.
#include <cmath>

#include "cases.h"
#include "check.h"
#include "cpu/step.h"

using namespace fastlangevin;

namespace {

void conversions() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const float f = from_float16(half), b = from_bfloat16(half);
    CHECK(std::isnan(f) ? std::isnan(from_float16(to_float16(f))) : to_float16(f) == half);
    CHECK(std::isnan(b) ? std::isnan(from_bfloat16(to_bfloat16(b))) : to_bfloat16(b) == half);
    const int exponent = static_cast<int>(bits >> 10 & 31u);
    const int mantissa = static_cast<int>(bits & 1023u);
    const double exact =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    if (exponent < 31) CHECK(std::fabs(f) == exact);
  }
  CHECK(to_float16(65519.0f) == 0x7bff);  // the last number that rounds to 65504
  CHECK(to_float16(65520.0f) == 0x7c00);
  CHECK(to_float16(1.0f + 0x1p-11f) == 0x3c00);  // ties to even
  CHECK(to_float16(1.0f + 0x3p-11f) == 0x3c02);
  CHECK(to_float16(0x1p-25f) == 0 && to_float16(0x1.8p-25f) == 1);
  CHECK(to_bfloat16(1.0f + 0x1p-8f) == 0x3f80 && to_bfloat16(1.0f + 0x3p-8f) == 0x3f82);
}

void nan_stays() {
  Bounds bounds{Step{}};
  bounds.clip = 1, bounds.lo = -1, bounds.hi = 1;
  const float nan = std::nanf("");
  CHECK(std::isnan(langevin<Scalar, true, true, false>(nan, 0, 0, 1, 1, bounds)));
  CHECK(std::isnan(langevin<Scalar, true, true, true>(0, nan, 0, 1, 1, bounds)));
  CHECK(langevin<Scalar, true, true, false>(0, 5, 0, 1, 1, bounds) == 1);
}

void instruction_sets_and_threads() {
  each_case([](const Case& c) {
    CHECK(cpu::choose_instruction_set("baseline"));
    const auto expected = outcome(c, [](const Step& step) { cpu::langevin_step(step, 1); });
    for (const char* name : {"baseline", "avx2", "avx512"}) {
      if (!cpu::choose_instruction_set(name)) continue;
      for (int threads : {1, 3}) {
        CHECK(outcome(c, [=](const Step& s) { cpu::langevin_step(s, threads); }) == expected);
      }
    }
  });
}

}  // namespace

int main() {
  conversions();
  nan_stays();
  instruction_sets_and_threads();
}
