// Compiled once per instruction set.
#include "pack.h"

#include <string.h>

#include <algorithm>

#include "convert.h"
#include "words.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {
namespace {

constexpr int64_t kSerialBelow = 65536;  // elements; starting threads costs more than the work

uint16_t one_of(Dtype dtype) { return dtype == Dtype::f16 ? 0x3C00 : 0x3F80; }

template <typename T, typename Word>
bool pack_rows(const Pack& c, Word word_of_values) {
  const int64_t words = words_per_row(c.length);
  int strange_threads = 0;
#pragma omp parallel num_threads(c.rows * c.length < kSerialBelow ? 1 : c.threads) reduction(+ : strange_threads)
  {
    Strange strange;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < c.rows; ++r) {
      const T* row = static_cast<const T*>(c.spikes) + r * c.length;
      uint32_t* to = c.words + r * words;
      for (int64_t w = 0; w < c.length / 32; ++w) to[w] = word_of_values(row + 32 * w, &strange);
      if (const int64_t rest = c.length % 32; rest != 0) {
        T tail[32] = {};
        memcpy(tail, row + c.length - rest, static_cast<size_t>(rest) * sizeof(T));
        to[words - 1] = word_of_values(tail, &strange);
      }
    }
    strange_threads += strange.any();
  }
  return strange_threads == 0;
}

template <typename T>
void unpack_as(const Pack& c, T one) {
  const int64_t words = words_per_row(c.length);
  T* spikes = static_cast<T*>(const_cast<void*>(c.spikes));
#pragma omp parallel for schedule(static) num_threads(c.rows * c.length < kSerialBelow ? 1 : c.threads)
  for (int64_t r = 0; r < c.rows; ++r) {
    for (int64_t w = 0; w < words; ++w) {
      const uint32_t word = c.words[r * words + w];
      T* to = spikes + r * c.length + 32 * w;
      T tail[32];
      const int64_t width = std::min<int64_t>(32, c.length - 32 * w);
      T* values = width < 32 ? tail : to;
#pragma omp simd
      for (int i = 0; i < 32; ++i) values[i] = (word >> i & 1) ? one : T(0);
      if (width < 32) memcpy(to, tail, static_cast<size_t>(width) * sizeof(T));
    }
  }
}

}  // namespace

bool pack(const Pack& c) {
  if (c.dtype == Dtype::f32)
    return pack_rows<float>(c, [](const float* s, Strange* strange) { return word_of(s, strange); });
  return pack_rows<uint16_t>(
      c, [one = one_of(c.dtype)](const uint16_t* s, Strange* strange) { return word_of(s, one, strange); });
}

void unpack(const Pack& c) {
  if (c.dtype == Dtype::f32)
    unpack_as<float>(c, 1.0f);
  else
    unpack_as<uint16_t>(c, one_of(c.dtype));
}

int64_t count(const uint32_t* words, int64_t number) {
  int64_t total = 0;
  for (int64_t i = 0; i < number; ++i) total += __builtin_popcount(words[i]);
  return total;
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
