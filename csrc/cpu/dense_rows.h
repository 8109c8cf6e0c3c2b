// A few rows of float32 times a strip of columns, their sums held in registers: the inner loop of what is dense in the backward
// pass.
#pragma once

#include <stdint.h>
#include <string.h>

#include "convert.h"
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

// kRows rows, one after the other.
struct PlainRows {
  const float* first;
  int64_t stride;
  float at(int row, int64_t k) const { return first[row * stride + k]; }
};

// kRows rows, [depth, kRows].
struct InterleavedRows {
  const float* first;
  float at(int row, int64_t k) const { return first[k * kRows + row]; }
};

template <int vectors>
struct RowSums {
  FloatVector sums[kRows][vectors];

  template <typename F>
  static void each(F f) {
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int p = 0; p < vectors; ++p) f(r, p);
  }

  template <int steps, typename Rows>
  void add(const Rows& rows, const float* strip, int64_t from) {
#pragma GCC unroll 4
    for (int step = 0; step < steps; ++step) {
      const int64_t k = from + step;
      FloatVector line[vectors];
#pragma GCC unroll 2
      for (int p = 0; p < vectors; ++p) line[p] = load(strip + k * kStrip + p * kLanes);
      each([&](int r, int p) { sums[r][p] = fused(all(rows.at(r, k)), line[p], sums[r][p]); });
    }
  }
};

// To `out`, [kRows, kStrip], or added to it: rows of `depth` values times a strip, [depth, kStrip], of which the first
// `vectors` vectors count. A line of what lies at `soon` is fetched every kSteps values of depth: a strip to come, which lies in
// the third-level cache.
template <int vectors, bool added, typename Rows>
void multiply_rows(const Rows& rows, const float* strip, int64_t depth, float* out, const float* soon) {
  RowSums<vectors> all_rows = {};
  int64_t k = 0;
  for (; k + kSteps <= depth; k += kSteps, soon += kLine / 4) {
    __builtin_prefetch(soon, 0, 2);
    all_rows.template add<kSteps>(rows, strip, k);
  }
  for (; k < depth; ++k) all_rows.template add<1>(rows, strip, k);
  if (added) all_rows.each([&](int r, int p) { all_rows.sums[r][p] += load(out + r * kStrip + p * kLanes); });
  all_rows.each([&](int r, int p) { memcpy(out + r * kStrip + p * kLanes, &all_rows.sums[r][p], sizeof(FloatVector)); });
}

// The part of a strip to come, `next`, that the panel's rows from row i on fetch.
inline const float* share_of(const float* next, int64_t i, int64_t depth) {
  return next + i / kRows * (depth / kSteps) * (kLine / 4);
}

// Rows of any dtype, `columns` wide, that are written a strip at a time; large ones past the caches.
struct StripWriter {
  void* data;
  Dtype dtype;
  bool stream;

  StripWriter(void* data, Dtype dtype, int64_t rows, int64_t columns)
      : data(data), dtype(dtype), stream(kStrip * sizeof(float) % kLine == 0 && may_stream(data, dtype, rows, columns)) {}

  // `width` values of a row, of which the first is element `at`; `from` is aligned to lines.
  void write(int64_t at, int64_t width, const float* from) const {
    if (stream)
      stream_lines(static_cast<float*>(data) + at, from, width);
    else if (dtype == Dtype::f32)
      memcpy(static_cast<float*>(data) + at, from, static_cast<size_t>(width) * sizeof(float));
    else
      store_row(data, dtype, at, width, from);
  }
};

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
