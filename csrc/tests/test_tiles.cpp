// Tiles in plain C++ against sums by hand and, where the processor has tiles, against its own.
#include <cmath>
#include <vector>

#include "check.h"
#include "cpu/tile_permission.h"
#include "cpu/tiles.h"

using namespace fastlangevin;

namespace {

constexpr int kC = 1, kA = 4, kB = 6;

// The operands of one product, with rows further apart than a tile needs.
struct Operands {
  int rows, pairs, columns;
  std::vector<uint16_t> a = std::vector<uint16_t>(rows * 40);
  std::vector<uint16_t> b = std::vector<uint16_t>(pairs * 48);
  std::vector<float> c = std::vector<float>(rows * 20);

  void set_a(int row, int k, float value) { a[row * 40 + k] = to_bfloat16(value); }
  void set_b(int k, int column, float value) {
    b[k / 2 * 48 + 2 * column + k % 2] = to_bfloat16(value);
  }
  float at(int row, int column) const { return c[row * 20 + column]; }
};

// C + A B + A B, so that C is loaded from registers as well as from memory.
template <class Tiles>
Operands multiplied(Operands operands) {
  TileShapes shapes = {};
  for (int tile : {kC, kA, kB}) {
    shapes.rows[tile] = tile == kB ? operands.pairs : operands.rows;
    shapes.bytes[tile] = 4 * (tile == kA ? operands.pairs : operands.columns);
  }
  Tiles tiles(shapes);
  tiles.template load<kC>(operands.c.data(), 20 * sizeof(float));
  tiles.template load<kA>(operands.a.data(), 40 * sizeof(uint16_t));
  tiles.template load<kB>(operands.b.data(), 48 * sizeof(uint16_t));
  tiles.template multiply_add<kC, kA, kB>();
  tiles.template multiply_add<kC, kA, kB>();
  tiles.template store<kC>(operands.c.data(), 20 * sizeof(float));
  return operands;
}

uint32_t state = 1;
float number() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) * 0x1p-24f - 0.5f;
}

Operands numbers(int rows, int pairs, int columns, float scale) {
  Operands operands{rows, pairs, columns};
  for (int k = 0; k < 2 * pairs; ++k) {
    for (int r = 0; r < rows; ++r) operands.set_a(r, k, number() * scale);
    for (int n = 0; n < columns; ++n) operands.set_b(k, n, number() * scale);
  }
  for (float& c : operands.c) c = number();
  return operands;
}

void products() {
  for (int rows : {1, 5, 16}) {
    for (int pairs : {1, 7, 16}) {
      for (int columns : {1, 3, 16}) {
        const Operands from = numbers(rows, pairs, columns, 1.0f);
        const Operands result = multiplied<EmulatedTiles>(from);
        for (int r = 0; r < rows; ++r) {
          for (int n = 0; n < 20; ++n) {
            if (n >= columns) {
              CHECK(result.at(r, n) == from.at(r, n));
              continue;
            }
            double sum = 0;
            for (int k = 0; k < 2 * pairs; ++k) {
              sum += double{from_bfloat16(from.a[r * 40 + k])} *
                     double{from_bfloat16(from.b[k / 2 * 48 + 2 * n + k % 2])};
            }
            CHECK(std::fabs(result.at(r, n) - (from.at(r, n) + 2 * sum)) <= 1e-5);
          }
        }
      }
    }
  }
}

// The result of one row and column, with `c` added once and the products twice.
float row_times_column(const std::vector<float>& a, const std::vector<float>& b, float c) {
  Operands operands{1, static_cast<int>(a.size() / 2), 1};
  for (size_t k = 0; k < a.size(); ++k) {
    operands.set_a(0, static_cast<int>(k), a[k]), operands.set_b(static_cast<int>(k), 0, b[k]);
  }
  operands.c[0] = c;
  return multiplied<EmulatedTiles>(operands).at(0, 0);
}

void rounding() {
  constexpr float kSmall = 0x1p-24f;
  // Even products and odd ones are summed apart: the small ones meet each other first.
  CHECK(row_times_column({1, kSmall, 0, kSmall}, {1, 1, 0, 1}, 0) == 2 + 0x1p-22f);
  CHECK(row_times_column({1, 0, kSmall, 0}, {1, 0, 1, 0}, 0) == 2);
  // In order: 1 absorbs what comes after it, but not what comes before it.
  CHECK(row_times_column({kSmall, 0, kSmall, 0, 1, 0}, {1, 0, 1, 0, 1, 0}, 0) == 2 + 0x1p-22f);
  CHECK(row_times_column({1, 0, kSmall, 0, kSmall, 0}, {1, 0, 1, 0, 1, 0}, 0) == 2);
  // C is added to the sum of the products, not the products one by one to C.
  CHECK(row_times_column({kSmall, 0, kSmall, 0}, {1, 0, 1, 0}, 1) == 1 + 0x1p-22f);
  // A fused product is not rounded: 2^100 * 2^28 would be infinite by itself.
  CHECK(row_times_column({-0x1p127f, 0, 0x1p100f, 0}, {1, 0, 0x1p28f, 0}, -0x1p127f) == 0x1p127f);
}

void small_numbers() {
  CHECK(row_times_column({0x1p-130f, 0}, {0x1p100f, 0}, 0) == 0);  // an operand
  CHECK(row_times_column({0x1p-100f, 0}, {0x1p-30f, 0}, 0) == 0);  // a product
  CHECK(row_times_column({0, 0}, {0, 0}, 0x1p-130f) == 0);         // C
  CHECK(row_times_column({0x1p-126f, 0}, {1, 0}, 0) == 0x1p-125f);
  // A product below the normal numbers still counts in a sum that is normal.
  CHECK(row_times_column({0x1p-126f, 0, 0x1p-100f, 0}, {1, 0, 0x1p-28f, 0}, 0) ==
        0x1p-125f + 0x1p-127f);
  CHECK(std::isnan(row_times_column({INFINITY, 0}, {0, 0}, 1)));
}

// A small number that meets only zeros changes no result, but makes the emulation use fused
// multiply-adds.
void exact_and_fused_products() {
  for (float scale : {1.0f, 0x1p60f, 0x1p-50f}) {
    Operands from = numbers(9, 16, 16, scale);
    for (int n = 0; n < 16; ++n) from.set_b(31, n, 0);
    const std::vector<float> exact = multiplied<EmulatedTiles>(from).c;
    from.set_a(4, 31, 0x1p-126f);
    CHECK(multiplied<EmulatedTiles>(from).c == exact);
  }
}

void hardware() {
#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
  if (const char* reason = cpu::why_no_tiles()) {
    std::fprintf(stderr, "not compared with the processor's tiles: %s\n", reason);
    return;
  }
  for (float scale : {1.0f, 0x1p60f, 0x1p-60f, 0x1p-62f, 0x1p-63f}) {
    for (int rows : {1, 9, 16}) {
      for (int pairs : {1, 6, 16}) {
        const Operands from = numbers(rows, pairs, 16, scale);
        CHECK(multiplied<EmulatedTiles>(from).c == multiplied<AmxTiles>(from).c);
      }
    }
  }
#else
  std::fprintf(stderr, "not compared with a processor's tiles: not compiled\n");
#endif
}

}  // namespace

int main() {
  products();
  rounding();
  small_numbers();
  exact_and_fused_products();
  hardware();
}
