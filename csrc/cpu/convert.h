// Rows of float16 and bfloat16 to and from float32, at the width of the instruction set this file is compiled for.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "../lif_step.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {

inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(f != f ? 0x7FC0 : rounded);
}

inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t rest = h & 0x7FFF;
  uint32_t bits;
  if (rest >= 0x7C00) {
    bits = sign | 0x7F800000u | (rest & 0x3FF) << 13;
  } else if (rest >= 0x400) {
    bits = sign | ((rest << 13) + 0x38000000u);
  } else {
    const float subnormal = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24
    memcpy(&bits, &subnormal, 4);
    bits |= sign;
  }
  float f;
  memcpy(&f, &bits, 4);
  return f;
#endif
}

inline uint16_t float_to_half(float f) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (bits >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds to 65536 or more
  if (bits < 0x38800000) {                                              // below 2^-14: a subnormal half
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;  // its last bit is then worth 2^-24, so the addition rounds as the format does
    memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3F000000));
  }
  return static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0xFFF + ((bits >> 13) & 1)) >> 13));
#endif
}

inline float load_value(const void* base, Dtype dtype, int64_t at) {
  if (dtype == Dtype::f32) return static_cast<const float*>(base)[at];
  const uint16_t bits = static_cast<const uint16_t*>(base)[at];
  return dtype == Dtype::bf16 ? bf16_to_float(bits) : half_to_float(bits);
}

// Row of `n` values as float32: the row itself when it is float32, else converted into `buffer`.
inline const float* load_row(const void* base, Dtype dtype, int64_t offset, int64_t n, float* buffer) {
  if (dtype == Dtype::f32) return static_cast<const float*>(base) + offset;
  const uint16_t* row = static_cast<const uint16_t*>(base) + offset;
  int64_t i = 0;
  if (dtype == Dtype::bf16) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) buffer[j] = bf16_to_float(row[j]);
    return buffer;
  }
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(buffer + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i))));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i))));
#endif
  for (; i < n; ++i) buffer[i] = half_to_float(row[i]);
  return buffer;
}

// Where the caller may write a row as float32: the row itself when it is float32, else `buffer` (then call store_row).
inline float* row_to_write(void* base, Dtype dtype, int64_t offset, float* buffer) {
  return dtype == Dtype::f32 ? static_cast<float*>(base) + offset : buffer;
}

inline void store_row(void* base, Dtype dtype, int64_t offset, int64_t n, const float* buffer) {
  if (dtype == Dtype::f32) return;
  uint16_t* row = static_cast<uint16_t*>(base) + offset;
  int64_t i = 0;
  if (dtype == Dtype::bf16) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) row[j] = float_to_bf16(buffer[j]);
    return;
  }
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(buffer + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(buffer + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) row[i] = float_to_half(buffer[i]);
}

// A row that is soon read or written, and that the hardware does not see coming, into the second-level cache: the first is full,
// and its few pending misses would hold up the loop.
inline void prefetch_row(const void* base, Dtype dtype, int64_t offset, int64_t width) {
  if (base == nullptr) return;
  const int64_t size = dtype == Dtype::f32 ? 4 : 2;
  const char* row = static_cast<const char*>(base) + offset * size;
  for (int64_t i = 0; i < width * size; i += 64) __builtin_prefetch(row + i, 0, 2);
  __asm__ volatile("");  // GCC drops calls of functions that do nothing but this
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
