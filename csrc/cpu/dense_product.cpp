// Compiled once per instruction set. A thread walks panels of rows, which it lays out for the inner loop in float32. For every
// strip of columns it sums over blocks of depth, so that a strip's block stays in the first-level cache for all rows of the panel,
// and the panel in the second.
#include "dense_product.h"

#include <algorithm>

#include "convert.h"
#include "dense_rows.h"
#include "events.h"
#include "threads.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {
namespace {

constexpr int64_t kDepth = 384;            // of a block
constexpr int64_t kPanelValues = 1 << 16;  // of a panel, where that leaves it enough rows
constexpr int64_t kLeastRows = 24, kMostRows = 96;

// [strips, depth, kStrip]
void lay_weights(const DenseProduct& c, float* to) {
  const int64_t strips = ceil_div(c.columns, kStrip);
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (int64_t k = 0; k < c.depth; ++k)
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t first = strip * kStrip, count = std::min<int64_t>(kStrip, c.columns - first);
      float* line = to + (strip * c.depth + k) * kStrip;
      std::copy_n(c.w + k * c.columns + first, count, line);
      std::fill(line + count, line + kStrip, 0.0f);
    }
}

struct Panels {
  const DenseProduct& c;
  const float* weights;  // laid out
  StripWriter out;
  float *sums, *rows, *buffer;  // [panel, kStrip], [panel / kRows, depth, kRows], [kRows, depth]

  static int64_t scratch(int64_t panel, int64_t depth) { return panel * (depth + kStrip) + kRows * depth; }

  Panels(const DenseProduct& c, const float* weights, int64_t panel, float* scratch)
      : c(c), weights(weights), out(c.out, c.out_dtype, c.rows, c.columns), sums(scratch), rows(sums + panel * kStrip),
        buffer(rows + panel * c.depth) {}

  void run(int64_t first, int64_t count) const {
    for (int64_t i = 0; i < count; i += kRows) take(first + i, std::min<int64_t>(kRows, count - i), rows + i * c.depth);
    for (int64_t column = 0; column < c.columns; column += kStrip) {
      for (int64_t k = 0; k < c.depth; k += kDepth) {
        const int64_t depth = std::min(kDepth, c.depth - k);
        const float *strip = weights + column * c.depth + k * kStrip, *next = strip + depth * kStrip;
        for (int64_t i = 0; i < count; i += kRows) {
          const InterleavedRows from{rows + i * c.depth + k * kRows};
          const float* soon = share_of(next, i, depth);
          if (k == 0)
            multiply_rows<2, false>(from, strip, depth, sums + i * kStrip, soon);
          else
            multiply_rows<2, true>(from, strip, depth, sums + i * kStrip, soon);
        }
      }
      const int64_t width = std::min<int64_t>(kStrip, c.columns - column);
      for (int64_t i = 0; i < count; ++i) out.write((first + i) * c.columns + column, width, sums + i * kStrip);
    }
  }

  // Some of kRows rows, and zeros for the rest.
  void take(int64_t first, int64_t count, float* to) const {
    const float* from[kRows];
    for (int r = 0; r < kRows; ++r) {
      float* row = buffer + r * c.depth;
      if (r >= count) std::fill_n(row, c.depth, 0.0f);
      from[r] = r < count ? load_row(c.x, c.x_dtype, (first + r) * c.depth, c.depth, row) : row;
    }
    for (int64_t k = 0; k < c.depth; ++k)
      for (int r = 0; r < kRows; ++r) to[k * kRows + r] = from[r][k];
  }
};

}  // namespace

void dense_product(const DenseProduct& c) {
  const AlignedArray<float> weights(ceil_div(c.columns, kStrip) * c.depth * kStrip);
  lay_weights(c, weights.data);
  const int64_t most = std::clamp(kPanelValues / c.depth, kLeastRows, kMostRows);
  const int64_t panel = ceil_div(std::min(most, ceil_div(c.rows, c.threads)), kRows) * kRows, panels = ceil_div(c.rows, panel);
  const int threads = static_cast<int>(std::min<int64_t>(c.threads, panels));
  const int64_t each = ceil_div(Panels::scratch(panel, c.depth), 16) * 16;
  const AlignedArray<float> scratch(threads * each);
#pragma omp parallel num_threads(threads)
  {
    const Panels work(c, weights.data, panel, scratch.data + thread_index() * each);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < panels; ++i) work.run(i * panel, std::min(panel, c.rows - i * panel));
  }
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
