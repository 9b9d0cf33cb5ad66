// Converts tiles of an operand of any layout and dtype to contiguous float32 and back.
#pragma once

#include "cpu/simd.h"
#include "cpu/step.h"

namespace fastlangevin {
namespace FASTLANGEVIN_ISA {
namespace {

using cpu::kTile;

// One tile of an operand: rows x columns elements and their strides.
struct Tile {
  int64_t rows, columns, row_stride, column_stride;

  bool contiguous() const { return column_stride == 1 && (rows == 1 || row_stride == columns); }
  Tile merged() const { return contiguous() ? Tile{1, rows * columns, 0, 1} : *this; }
};

// Converts one row; float16 uses the processor's conversions if it has them.
template <Dtype kDtype>
void read_row(const typename Storage<kDtype>::Type* from, int64_t count, float* to) {
  int64_t k = 0;
#ifdef __F16C__
  if constexpr (kDtype == Dtype::kFloat16) {
    for (; k + 8 <= count; k += 8) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k));
      _mm256_storeu_ps(to + k, _mm256_cvtph_ps(halves));
    }
  }
#endif
  for (; k < count; ++k) to[k] = Storage<kDtype>::read(from[k]);
}

template <Dtype kDtype>
void write_row(const float* from, int64_t count, typename Storage<kDtype>::Type* to) {
  int64_t k = 0;
#ifdef __F16C__
  if constexpr (kDtype == Dtype::kFloat16) {
    for (; k + 8 <= count; k += 8) {
      const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + k), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + k), halves);
    }
  }
#endif
  for (; k < count; ++k) to[k] = Storage<kDtype>::write(from[k]);
}

template <Dtype kDtype>
void read_tile(const void* data, int64_t offset, Tile tile, float* to) {
  const auto* from = static_cast<const typename Storage<kDtype>::Type*>(data) + offset;
  if (tile.column_stride == 1) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      read_row<kDtype>(from + r * tile.row_stride, tile.columns, to + r * tile.columns);
    }
    return;
  }
  typename Storage<kDtype>::Type moved[kTile];
  for (int64_t c = 0; c < tile.columns; ++c) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      moved[r * tile.columns + c] = from[r * tile.row_stride + c * tile.column_stride];
    }
  }
  read_row<kDtype>(moved, tile.rows * tile.columns, to);
}

template <Dtype kDtype>
void write_tile(const float* from, Tile tile, void* data, int64_t offset) {
  auto* to = static_cast<typename Storage<kDtype>::Type*>(data) + offset;
  if (tile.column_stride == 1) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      write_row<kDtype>(from + r * tile.columns, tile.columns, to + r * tile.row_stride);
    }
    return;
  }
  typename Storage<kDtype>::Type moved[kTile];
  write_row<kDtype>(from, tile.rows * tile.columns, moved);
  for (int64_t c = 0; c < tile.columns; ++c) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      to[r * tile.row_stride + c * tile.column_stride] = moved[r * tile.columns + c];
    }
  }
}

}  // namespace
}  // namespace FASTLANGEVIN_ISA
}  // namespace fastlangevin
