// A cache line of 64 bytes as native vectors, and sums of the lines of a tile that a list names: the inner loop of every
// product of spikes. A tile is a stack of lines, one per input neuron, followed by one line of zeros.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "spike_matmul.h"
#include "stream.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {

#if defined(__AVX512F__)
constexpr int kVector = 64;
#elif defined(__AVX2__)
constexpr int kVector = 32;
#else
constexpr int kVector = 16;
#endif
constexpr int kParts = kLine / kVector;
constexpr int kLanes = kVector / 4;

typedef float FloatVector __attribute__((vector_size(kVector), may_alias));
typedef float LooseFloats __attribute__((vector_size(kVector), may_alias, aligned(4)));
typedef int32_t IntVector __attribute__((vector_size(kVector), may_alias));
typedef uint32_t WordVector __attribute__((vector_size(kVector), may_alias));
typedef uint16_t ShortVector __attribute__((vector_size(kVector), may_alias));

// a b + c, rounded once where the machine can.
inline FloatVector fused(FloatVector a, FloatVector b, FloatVector c) {
#if defined(__AVX512F__)
  return (FloatVector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (FloatVector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The four line offsets of one group of a list, in units; taken apart by halves, which costs fewer instructions than shifting
// the whole four times.
struct Group {
  uint32_t low, high;
  explicit Group(const uint16_t* list) {
    uint64_t bits;
    memcpy(&bits, list, 8);
    low = static_cast<uint32_t>(bits);
    high = static_cast<uint32_t>(bits >> 32);
  }
  int64_t operator[](int i) const {
    const uint32_t half = i < 2 ? low : high;
    return i % 2 == 0 ? half & 0xFFFF : half >> 16;
  }
};

// The sums of a row's columns, in registers: columns kLanes n to kLanes (n + 1) are part n.
template <typename Kind>
struct Sums {
  using Vector = typename Kind::Vector;
  Vector parts[Kind::kColumns / kLanes];

  template <typename F>
  static void each(F f) {
#pragma GCC unroll 16
    for (int n = 0; n < Kind::kColumns / kLanes; ++n) f(n);
  }
  void add(const Vector* kept) {
    each([&](int n) { parts[n] += kept[n]; });
  }
  void keep(Vector* kept) const {
    each([&](int n) { kept[n] = parts[n]; });
  }
};

// float32 weights, 16 to a line; exact but for the order of the sum.
struct Float32 {
  using Wide = float;
  using Vector = FloatVector;
  static constexpr int kColumns = 16;

  static Sums<Float32> sum(const char* tile, const uint16_t* list, int64_t groups, int64_t) {
    FloatVector a[4][kParts] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const Group at(list + 4 * g);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p)
          a[i][p] += *reinterpret_cast<const FloatVector*>(tile + at[i] * kUnit + p * kVector);
    }
    Sums<Float32> out;
    out.each([&](int p) { out.parts[p] = (a[0][p] + a[1][p]) + (a[2][p] + a[3][p]); });
    return out;
  }
};

// int16 weights, 32 to a line: column i is short 2i, column 16 + i short 2i + 1, so that they are widened where they lie. The
// positive and the negative weights of a column's block of a tile each sum to less than 2^15 (spikeclip/ops/weights.py sees to
// that), so no partial sum overflows.
struct Int16 {
  using Wide = int32_t;
  using Vector = IntVector;
  static constexpr int kColumns = 32;

  static int place(int64_t column) { return static_cast<int>(column % 16 * 2 + column / 16); }

  static Sums<Int16> sum(const char* tile, const uint16_t* list, int64_t groups, int64_t) {
    ShortVector a[2][kParts] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const Group at(list + 4 * g);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p)
          a[i % 2][p] += *reinterpret_cast<const ShortVector*>(tile + at[i] * kUnit + p * kVector);
    }
    Sums<Int16> out;
    out.each([&](int n) {
      const int p = n % kParts;
      const WordVector both = (WordVector)(a[0][p] + a[1][p]);
      out.parts[n] = (IntVector)(n < kParts ? both << 16 : both) >> 16;
    });
    return out;
  }
};

// int8 weights plus 128, 64 to a line: column 16 j + i is byte 4i + j. At most 256 bytes are added in 16 bits, so neither half of
// a lane overflows: the odd bytes are summed alone, and what they leave in the sum of whole lanes is subtracted, modulo 2^16.
struct Int8 {
  using Wide = int32_t;
  using Vector = IntVector;
  static constexpr int kColumns = 64;

  static int place(int64_t column) { return static_cast<int>(column % 16 * 4 + column / 16); }

  static Sums<Int8> sum(const char* tile, const uint16_t* list, int64_t groups, int64_t events) {
    constexpr int64_t kMost = 64;  // groups that 16 bits hold
    Sums<Int8> out = narrow_sum(tile, list, std::min(groups, kMost));
    for (int64_t done = kMost; done < groups; done += kMost) {
      const auto more = narrow_sum(tile, list + 4 * done, std::min(groups - done, kMost));
      out.add(more.parts);
    }
    const int32_t offset = static_cast<int32_t>(128 * events);
    out.each([&](int n) { out.parts[n] -= offset; });
    return out;
  }

 private:
  static Sums<Int8> narrow_sum(const char* tile, const uint16_t* list, int64_t groups) {
    ShortVector whole[2][kParts] = {}, odd[2][kParts] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const Group at(list + 4 * g);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) {
          const ShortVector line = *reinterpret_cast<const ShortVector*>(tile + at[i] * kUnit + p * kVector);
          whole[i % 2][p] += line;
          odd[i % 2][p] += line >> 8;
        }
    }
    Sums<Int8> out;
    out.each([&](int n) {
      const int p = n % kParts, j = n / kParts;
      const ShortVector high = odd[0][p] + odd[1][p], low = whole[0][p] + whole[1][p] - (high << 8);
      const WordVector both = (WordVector)(j % 2 == 0 ? low : high);
      out.parts[n] = (IntVector)(j < 2 ? both & 0xFFFF : both >> 16);
    });
    return out;
  }
};

// The first of `left` floats that a line has room for.
inline void copy_line(void* line, const float* from, int64_t left) {
  if (left >= kLine / 4)
    memcpy(line, from, kLine);
  else
    memcpy(line, from, static_cast<size_t>(left) * sizeof(float));
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
