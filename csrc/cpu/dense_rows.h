// A few rows of float32 times a strip of columns, their sums held in registers: the inner loop of what is dense in the backward
// pass.
#pragma once

#include <stdint.h>
#include <string.h>

#include "lines.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {

constexpr int kStrip = 2 * kLanes;  // columns
#if defined(__AVX512F__)
constexpr int kRows = 14, kSteps = 1;
#else
constexpr int kRows = 6, kSteps = 4;  // so few rows want several steps in depth between two tests of the loop
#endif

inline FloatVector load(const float* from) {
  FloatVector v;
  memcpy(&v, from, sizeof v);
  return v;
}

// Adding x to zeros would cost an instruction, since -0 + 0 is not -0.
inline FloatVector all(float x) {
#if defined(__AVX512F__)
  return (FloatVector)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (FloatVector)_mm256_set1_ps(x);
#else
  return FloatVector{x, x, x, x};
#endif
}

template <int vectors>
struct RowSums {
  FloatVector sums[kRows][vectors];

  template <int steps>
  void add(const float* rows, int64_t stride, const float* strip) {
#pragma GCC unroll 4
    for (int k = 0; k < steps; ++k) {
      FloatVector line[vectors];
#pragma GCC unroll 2
      for (int p = 0; p < vectors; ++p) line[p] = load(strip + k * kStrip + p * kLanes);
#pragma GCC unroll 14
      for (int r = 0; r < kRows; ++r) {
        const FloatVector value = all(rows[r * stride + k]);
#pragma GCC unroll 2
        for (int p = 0; p < vectors; ++p) sums[r][p] = fused(value, line[p], sums[r][p]);
      }
    }
  }
};

// To `out`, [kRows, kStrip], or on top of it: kRows rows of `depth` values times a strip, [depth, kStrip], of which the first
// `vectors` vectors count. A line of what lies at `soon` is fetched every kSteps values of depth: a strip to come, which lies in
// the third-level cache.
template <int vectors, bool on_top = false>
void multiply_rows(const float* rows, int64_t stride, const float* strip, int64_t depth, float* out, const float* soon) {
  RowSums<vectors> all_rows = {};
  if (on_top)
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int p = 0; p < vectors; ++p) all_rows.sums[r][p] = load(out + r * kStrip + p * kLanes);
  int64_t k = 0;
  for (; k + kSteps <= depth; k += kSteps, soon += kLine / 4) {
    __builtin_prefetch(soon, 0, 2);
    all_rows.template add<kSteps>(rows + k, stride, strip + k * kStrip);
  }
  for (; k < depth; ++k) all_rows.template add<1>(rows + k, stride, strip + k * kStrip);
#pragma GCC unroll 14
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int p = 0; p < vectors; ++p) memcpy(out + r * kStrip + p * kLanes, &all_rows.sums[r][p], sizeof(FloatVector));
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
