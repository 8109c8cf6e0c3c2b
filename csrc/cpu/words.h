// 32 values to a word, and 16 comparisons to half of one.
#pragma once

#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace spikeclip {
namespace SPIKECLIP_ISA {

// Collects what is neither 0 nor 1.
#if defined(__AVX2__)
struct Strange {
  __m256i bits = _mm256_setzero_si256();
  bool any() const { return !_mm256_testz_si256(bits, bits); }
};

inline uint32_t word_of(const float* s, Strange* strange) {
  const __m256i one = _mm256_set1_epi32(0x3F800000);
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s + 8 * i));
    const __m256i fired = _mm256_cmpeq_epi32(bits, one);
    const __m256i other = _mm256_andnot_si256(fired, _mm256_add_epi32(bits, bits));  // -0 is 0
    word |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(fired))) << (8 * i);
    strange->bits = _mm256_or_si256(strange->bits, other);
  }
  return word;
}

inline uint32_t word_of(const uint16_t* s, uint16_t one_bits, Strange* strange) {
  const __m256i one = _mm256_set1_epi16(static_cast<int16_t>(one_bits));
  __m256i fired[2];
  for (int i = 0; i < 2; ++i) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s + 16 * i));
    fired[i] = _mm256_cmpeq_epi16(bits, one);
    const __m256i other = _mm256_andnot_si256(fired[i], _mm256_add_epi16(bits, bits));
    strange->bits = _mm256_or_si256(strange->bits, other);
  }
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(fired[0], fired[1]), 0xD8);
  return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
}
#else
struct Strange {
  bool seen = false;
  bool any() const { return seen; }
};

inline uint32_t word_of(const float* s, Strange* strange) {
  uint32_t word = 0;
  for (int i = 0; i < 32; ++i) {
    word |= static_cast<uint32_t>(s[i] == 1.0f) << i;
    strange->seen |= !(s[i] == 1.0f || s[i] == 0.0f);
  }
  return word;
}

inline uint32_t word_of(const uint16_t* s, uint16_t one_bits, Strange* strange) {
  uint32_t word = 0;
  for (int i = 0; i < 32; ++i) {
    word |= static_cast<uint32_t>(s[i] == one_bits) << i;
    strange->seen |= s[i] != one_bits && (s[i] & 0x7FFF) != 0;
  }
  return word;
}
#endif

// Bit i: h[i] >= threshold.
inline uint32_t reached(const float* h, float threshold) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(h), _mm512_set1_ps(threshold), _CMP_GE_OQ);
#elif defined(__AVX2__)
  const __m256 least = _mm256_set1_ps(threshold);
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(h), least, _CMP_GE_OQ));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(h + 8), least, _CMP_GE_OQ));
  return static_cast<uint32_t>(low | high << 8);
#else
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(h[i] >= threshold) << i;
  return bits;
#endif
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
