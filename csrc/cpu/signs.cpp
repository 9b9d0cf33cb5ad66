// Eight values make a byte. AVX2 is enough: both directions run at the speed of memory, and wider
// registers gain nothing.
#include "cpu/signs.h"

#include "cpu/parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define FASTLANGEVIN_AVX2 __attribute__((target("avx2,f16c")))
#endif

namespace fastlangevin {
namespace cpu {
namespace {

// With fewer bytes of bits per thread, waking a thread costs more than it saves.
constexpr int64_t kBytesPerThread = 4096;

template <Dtype kDtype>
uint8_t pack_some(const typename Storage<kDtype>::Type* values, int count, bool unordered) {
  unsigned byte = 0;
  for (int k = 0; k < count; ++k) {
    const float value = Storage<kDtype>::read(values[k]);
    byte |= unsigned{unordered ? !(value <= 0.0f) : value > 0.0f} << k;
  }
  return static_cast<uint8_t>(byte);
}

template <Dtype kDtype>
void apply_some(typename Storage<kDtype>::Type* grad, int count, unsigned byte, float slope) {
  for (int k = 0; k < count; ++k) {
    if (byte >> k & 1) continue;
    grad[k] = Storage<kDtype>::write(slope == 0.0f ? 0.0f : slope * Storage<kDtype>::read(grad[k]));
  }
}

#ifdef FASTLANGEVIN_AVX2

template <Dtype kDtype>
FASTLANGEVIN_AVX2 inline __m256 read_eight(const typename Storage<kDtype>::Type* from) {
  if constexpr (kDtype == Dtype::kFloat32) {
    return _mm256_loadu_ps(from);
  } else {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if constexpr (kDtype == Dtype::kFloat16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
}

// Rounds to nearest, ties to even. A NaN in bfloat16 keeps its upper bits and stays quiet.
template <Dtype kDtype>
FASTLANGEVIN_AVX2 inline void write_eight(__m256 value, typename Storage<kDtype>::Type* to) {
  if constexpr (kDtype == Dtype::kFloat32) {
    _mm256_storeu_ps(to, value);
  } else if constexpr (kDtype == Dtype::kFloat16) {
    const __m128i halves = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
  } else {
    const __m256i word = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(word, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
    const __m256i quiet = _mm256_or_si256(word, _mm256_set1_epi32(0x400000));
    rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan));
    rounded = _mm256_srli_epi32(rounded, 16);
    const __m256i packed = _mm256_packus_epi32(rounded, rounded);
    const __m256i joined = _mm256_permute4x64_epi64(packed, 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(joined));
  }
}

template <Dtype kDtype>
FASTLANGEVIN_AVX2 void pack_avx2(const typename Storage<kDtype>::Type* values, int64_t bytes,
                                 bool unordered, uint8_t* bits) {
  const __m256 zero = _mm256_setzero_ps();
  for (int64_t k = 0; k < bytes; ++k) {
    const __m256 value = read_eight<kDtype>(values + 8 * k);
    const __m256 set = unordered ? _mm256_cmp_ps(value, zero, _CMP_NLE_UQ)
                                 : _mm256_cmp_ps(value, zero, _CMP_GT_OQ);
    bits[k] = static_cast<uint8_t>(_mm256_movemask_ps(set));
  }
}

template <Dtype kDtype>
FASTLANGEVIN_AVX2 void apply_avx2(typename Storage<kDtype>::Type* grad, int64_t bytes,
                                  const uint8_t* bits, float slope) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256 slopes = _mm256_set1_ps(slope);
  for (int64_t k = 0; k < bytes; ++k) {
    const __m256 value = read_eight<kDtype>(grad + 8 * k);
    const __m256i own = _mm256_and_si256(_mm256_set1_epi32(bits[k]), each);
    const __m256 set = _mm256_castsi256_ps(_mm256_cmpeq_epi32(own, each));
    const __m256 other = slope == 0.0f ? _mm256_setzero_ps() : _mm256_mul_ps(value, slopes);
    write_eight<kDtype>(_mm256_blendv_ps(other, value, set), grad + 8 * k);
  }
}

bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") != 0;
  return has;
}

#endif

template <Dtype kDtype>
void pack_bytes(const typename Storage<kDtype>::Type* values, int64_t bytes, bool unordered,
                uint8_t* bits) {
#ifdef FASTLANGEVIN_AVX2
  if (has_avx2()) return pack_avx2<kDtype>(values, bytes, unordered, bits);
#endif
  for (int64_t k = 0; k < bytes; ++k) bits[k] = pack_some<kDtype>(values + 8 * k, 8, unordered);
}

template <Dtype kDtype>
void apply_bytes(typename Storage<kDtype>::Type* grad, int64_t bytes, const uint8_t* bits,
                 float slope) {
#ifdef FASTLANGEVIN_AVX2
  if (has_avx2()) return apply_avx2<kDtype>(grad, bytes, bits, slope);
#endif
  for (int64_t k = 0; k < bytes; ++k) apply_some<kDtype>(grad + 8 * k, 8, bits[k], slope);
}

int useful_threads(int64_t bytes, int threads) {
  const int64_t most = bytes / kBytesPerThread + 1;
  return most < threads ? static_cast<int>(most) : threads;
}

template <Dtype kDtype>
void pack(const void* data, int64_t count, bool unordered, uint8_t* bits, int threads) {
  const auto* values = static_cast<const typename Storage<kDtype>::Type*>(data);
  const int64_t bytes = count / 8;
  parallel_for(bytes, useful_threads(bytes, threads), [&](int64_t first, int64_t last) {
    pack_bytes<kDtype>(values + 8 * first, last - first, unordered, bits + first);
  });
  const int rest = static_cast<int>(count % 8);
  if (rest) bits[bytes] = pack_some<kDtype>(values + 8 * bytes, rest, unordered);
}

template <Dtype kDtype>
void apply(void* data, int64_t count, const uint8_t* bits, float slope, int threads) {
  auto* grad = static_cast<typename Storage<kDtype>::Type*>(data);
  const int64_t bytes = count / 8;
  parallel_for(bytes, useful_threads(bytes, threads), [&](int64_t first, int64_t last) {
    apply_bytes<kDtype>(grad + 8 * first, last - first, bits + first, slope);
  });
  const int rest = static_cast<int>(count % 8);
  if (rest) apply_some<kDtype>(grad + 8 * bytes, rest, bits[bytes], slope);
}

}  // namespace

void pack_signs(const void* values, Dtype dtype, int64_t count, bool unordered, uint8_t* bits,
                int threads) {
  with_dtype(dtype, [&](auto known) {
    pack<decltype(known)::value>(values, count, unordered, bits, threads);
  });
}

void apply_signs(void* grad, Dtype dtype, int64_t count, const uint8_t* bits, float slope,
                 int threads) {
  with_dtype(dtype,
             [&](auto known) { apply<decltype(known)::value>(grad, count, bits, slope, threads); });
}

}  // namespace cpu
}  // namespace fastlangevin
