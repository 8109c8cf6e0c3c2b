// Transposition of packed spikes, 64 x 64 bits at a time.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>

namespace spikeclip {
namespace SPIKECLIP_ISA {

// In place: bit c of a[r] goes to bit r of a[c] (Warren, Hacker's Delight, 7-3, with low bits first).
inline void transpose_block(uint64_t* a) {
  uint64_t mask = 0x00000000FFFFFFFFull;
  for (int j = 32; j != 0; j >>= 1, mask ^= mask << j) {
    for (int k = 0; k < 64; k += 2 * j) {
#pragma omp simd
      for (int i = k; i < k + j; ++i) {
        const uint64_t t = (a[i] >> j ^ a[i + j]) & mask;
        a[i] ^= t << j;
        a[i + j] ^= t;
      }
    }
  }
}

// rows x length bits, `stride` 32-bit words from row to row, to length (rounded up to 64) rows of `width` 64-bit words.
inline void transpose_bits(const uint32_t* words, int64_t stride, int64_t rows, int64_t length, uint64_t* out, int64_t width) {
  alignas(64) uint64_t block[64];
  for (int64_t c = 0; c < length; c += 64) {
    const int64_t here = std::min<int64_t>(8, 4 * (stride - c / 32));
    for (int64_t r = 0; r < width * 64; r += 64) {
      memset(block, 0, sizeof block);
      for (int64_t i = r; i < std::min(r + 64, rows); ++i) memcpy(block + i - r, words + i * stride + c / 32, here);
      transpose_block(block);
      for (int64_t i = 0; i < 64; ++i) out[(c + i) * width + r / 64] = block[i];
    }
  }
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
