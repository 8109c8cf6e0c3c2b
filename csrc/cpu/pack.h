// Spikes at one bit each: row r of [rows, length] becomes words_per_row(length) little-endian 32-bit words, padded with 0.
#pragma once

#include <stdint.h>

#include "../lif_step.h"

namespace spikeclip {

inline int64_t words_per_row(int64_t length) { return (length + 31) / 32; }

struct Pack {
  const void* spikes;
  Dtype dtype;
  uint32_t* words;
  int64_t rows, length;
  int threads;
};

#define SPIKECLIP_DECLARE(isa)                                        \
  namespace isa {                                                     \
  bool pack(const Pack& call); /* false: a value is neither 0 nor 1 */ \
  void unpack(const Pack& call);                                      \
  }
SPIKECLIP_DECLARE(baseline)
#if defined(__x86_64__)
SPIKECLIP_DECLARE(avx2)
SPIKECLIP_DECLARE(avx512)
#endif
#undef SPIKECLIP_DECLARE

// Set bits among `words` words.
inline int64_t count_bits(const uint32_t* words, int64_t count) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += __builtin_popcount(words[i]);
  return total;
}

}  // namespace spikeclip
