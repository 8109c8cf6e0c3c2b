// Whole cache lines written past the caches: of outputs too large to stay in them, which need not be read to be written.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../lif_step.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {

constexpr int kLine = 64;

// May whole lines be streamed? Only to aligned float32 rows, and only where the output outgrows the second-level cache.
inline bool may_stream(const void* data, Dtype dtype, int64_t rows, int64_t columns) {
  return dtype == Dtype::f32 && columns % 16 == 0 && reinterpret_cast<uintptr_t>(data) % kLine == 0 &&
         rows * columns * 4 > (int64_t{1} << 20);
}

inline void stream_line(void* to, const void* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_load_si512(from));
#elif defined(__AVX2__)
  for (int p = 0; p < 2; ++p)
    _mm256_stream_si256(static_cast<__m256i*>(to) + p, _mm256_load_si256(static_cast<const __m256i*>(from) + p));
#else
  memcpy(to, from, kLine);
#endif
}

// `count` floats, which are whole lines.
inline void stream_lines(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLine / 4) stream_line(to + i, from + i);
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
