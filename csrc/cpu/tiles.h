// The registers of a matrix unit: Intel's AMX, and the same in plain C++.
//
// A tile has up to 16 rows of 64 bytes. multiply_add<kC, kA, kB> adds the matrix product A B to C.
// C is float32. A row of A holds bfloat16 numbers in pairs. B has a row for each of these pairs,
// and in it a pair for each column of C.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/step.h"

namespace fastlangevin {
namespace {

constexpr int kTileRows = 16, kTileBytes = 64, kTileRegisters = 8;

// The rows of each register, and the bytes of a row.
struct TileShapes {
  int rows[kTileRegisters], bytes[kTileRegisters];
};

// Computes what Intel's manual says of TDPBF16PS: the even and the odd products of a row and a
// column are summed by fused multiply-adds, separately and in order. The two sums are added to each
// other and then to C. Numbers below the normal ones count as zero, also between two operations.
class EmulatedTiles {
 public:
  explicit EmulatedTiles(const TileShapes& shapes) : shapes_(shapes) {}
  EmulatedTiles(const EmulatedTiles&) = delete;

  template <int kTile>
  void zero() {
    std::memset(data_[kTile], 0, sizeof data_[kTile]);
  }
  // Rows are `stride` bytes apart in memory.
  template <int kTile>
  void load(const void* from, int64_t stride) {
    for (int r = 0; r < shapes_.rows[kTile]; ++r) {
      std::memcpy(data_[kTile][r], static_cast<const char*>(from) + r * stride,
                  shapes_.bytes[kTile]);
    }
  }
  template <int kTile>
  void store(void* to, int64_t stride) const {
    for (int r = 0; r < shapes_.rows[kTile]; ++r) {
      std::memcpy(static_cast<char*>(to) + r * stride, data_[kTile][r], shapes_.bytes[kTile]);
    }
  }
  template <int kC, int kA, int kB>
  void multiply_add() {
    const int columns = shapes_.bytes[kC] / 4, pairs = shapes_.rows[kB];
    Range range_a, range_b;
    Row b[kTileRows][2] = {};  // [pair][even or odd][column]
    for (int k = 0; k < pairs; ++k) {
      for (int n = 0; n < columns; ++n) {
        for (int i = 0; i < 2; ++i) range_b.add(b[k][i][n] = half<kB>(k, 2 * n + i));
      }
    }
    for (int m = 0; m < shapes_.rows[kC]; ++m) {
      for (int k = 0; k < 2 * pairs; ++k) range_a.add(half<kA>(m, k));
    }
    // A product of two bfloat16 numbers has 16 bits: if it is normal, it is not rounded, and a
    // multiplication and an addition are what the fused operation is, at a tenth of its time here.
    const bool exact =
        range_a.greatest * range_b.greatest <= FLT_MAX && range_a.least * range_b.least >= FLT_MIN;
    for (int m = 0; m < shapes_.rows[kC]; ++m) {
      Row sums[2] = {};
      for (int k = 0; k < pairs; ++k) {
        for (int i = 0; i < 2; ++i) {
          const float a = half<kA>(m, 2 * k + i);
          if (exact) {
            sums[i] += a * b[k][i];
          } else {
            for (int n = 0; n < columns; ++n) sums[i][n] = std::fma(a, b[k][i][n], sums[i][n]);
          }
          flush(sums[i]);
        }
      }
      Row c = {};
      std::memcpy(&c, data_[kC][m], shapes_.bytes[kC]);
      flush(c);
      sums[0] += sums[1];
      flush(sums[0]);
      c += sums[0];
      flush(c);
      std::memcpy(data_[kC][m], &c, shapes_.bytes[kC]);
    }
  }

 private:
  // A row of C, or the numbers of a row of B that meet the same column of A.
  using Row __attribute__((vector_size(kTileBytes))) = float;
  using Word __attribute__((vector_size(kTileBytes))) = uint32_t;

  // The magnitudes of some numbers, without zeros.
  struct Range {
    double least = HUGE_VAL, greatest = 0;

    void add(float value) {
      const double size = std::isfinite(value) ? std::fabs(value) : HUGE_VAL;
      if (size > greatest) greatest = size;
      if (size > 0 && size < least) least = size;
    }
  };

  static void flush(Row& values) {
    const Word bits = reinterpret_cast<Word>(values);
    const Word normal = reinterpret_cast<Word>((bits & 0x7fffffffu) >= 0x00800000u);
    values = reinterpret_cast<Row>(bits & (normal | 0x80000000u));
  }
  template <int kTile>
  float half(int row, int column) const {
    uint16_t bits;
    std::memcpy(&bits, data_[kTile][row] + column * sizeof bits, sizeof bits);
    if ((bits & 0x7f80u) == 0) bits &= 0x8000u;
    return from_bfloat16(bits);
  }

  TileShapes shapes_;
  char data_[kTileRegisters][kTileRows][kTileBytes] = {};
};

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)

// The instructions themselves. The intrinsics of GCC 12 do not tell the compiler that they read
// memory, so that it may move or drop what was written there.
class AmxTiles {
 public:
  explicit AmxTiles(const TileShapes& shapes) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof config == 64);
    for (int k = 0; k < kTileRegisters; ++k) {
      config.bytes[k] = static_cast<uint16_t>(shapes.bytes[k]);
      config.rows[k] = static_cast<uint8_t>(shapes.rows[k]);
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }
  AmxTiles(const AmxTiles&) = delete;
  // Registers that are released need not be saved when the system takes the processor away.
  ~AmxTiles() { __asm__ volatile("tilerelease"); }

  template <int kTile>
  void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  void load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                     :
                     : "r"(from), "r"(stride), "i"(kTile)
                     : "memory");
  }
  template <int kTile>
  void store(void* to, int64_t stride) const {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                     :
                     : "r"(to), "r"(stride), "i"(kTile)
                     : "memory");
  }
  template <int kC, int kA, int kB>
  void multiply_add() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
};

#endif

}  // namespace
}  // namespace fastlangevin
