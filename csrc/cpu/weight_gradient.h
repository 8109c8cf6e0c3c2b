// dW = spikes^T dy, event-driven: spikes transposed, the rows become the inputs, and dW's row k adds the lines of dy at which
// input k fired.
#pragma once

#include "events.h"
#include "pack.h"
#include "transpose.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {

struct WeightGradient {
  int64_t rows, length, columns;
  const void* dy;  // [rows, columns]
  Dtype dy_dtype;
  float* dw;  // [length, columns]
  int threads;
};

// Rows of spikes, which `source` gives, are taken in blocks, each summed on its own, in an order that does not depend on the
// number of threads.
template <typename Source>
void weight_gradient(const WeightGradient& c, const Source& source) {
  constexpr int64_t kDepth = 384, kColumns = Float32::kColumns, kBlocksAtOnce = 24;
  constexpr int64_t kStrips = 4, kTile = (kDepth + 1) * kLine;  // strips of dy that a thread reads together, and bytes of each
  const int64_t strips = ceil_div(c.columns, kColumns), blocks = ceil_div(c.rows, kDepth), stride = words_per_row(c.length);
  const int64_t at_once = std::min(blocks, kBlocksAtOnce), padded = ceil_div(c.length, 64) * 64;
  const int64_t size = c.dy_dtype == Dtype::f32 ? 4 : 2;  // of an element of dy
  const int64_t together = std::clamp<int64_t>(strips / (2 * c.threads), 1, kStrips);
  const int64_t list_size = Lists::capacity(padded, kDepth);
  const AlignedArray<uint16_t> offsets(at_once * list_size);
  const AlignedArray<int32_t> starts(at_once * (padded + 1)), events(at_once * padded);
  const AlignedArray<float> sums(strips * c.length * kColumns);
  const Padded zeros(nullptr, 0, strips * kColumns);
  const Output out{c.dw, Dtype::f32, c.columns, nullptr, zeros.data, false};
  const auto lists = [&](int64_t slot) {
    return Lists{offsets.data + slot * list_size, starts.data + slot * (padded + 1), events.data + slot * padded};
  };
  for (int64_t done = 0; done < blocks; done += at_once) {
    const int64_t now = std::min(at_once, blocks - done);
#pragma omp parallel num_threads(c.threads)
    {
      const AlignedArray<uint32_t> scratch(source.scratch(kDepth));
      const AlignedArray<uint64_t> columns(padded * kDepth / 64);
#pragma omp for schedule(dynamic, 1)
      for (int64_t slot = 0; slot < now; ++slot) {
        const int64_t first = (done + slot) * kDepth, rows = std::min(kDepth, c.rows - first);
        transpose_bits(source.rows(first, rows, scratch.data), stride, rows, c.length, columns.data, kDepth / 64);
        lists(slot).fill(c.length, static_cast<uint16_t>(kDepth * kLine), [&](int64_t input, uint16_t* list) {
          const auto* bits = reinterpret_cast<const uint8_t*>(columns.data) + input * kDepth / 8;
          return decode_bits(bits, ceil_div(rows, 8), 0, list);
        });
      }
      const AlignedArray<char> tiles(together * kTile);
      memset(tiles.data, 0, static_cast<size_t>(together * kTile));
#pragma omp for schedule(dynamic, 1)
      for (int64_t begin = 0; begin < strips; begin += together) {
        const int64_t end = std::min(strips, begin + together), width = std::min(end * kColumns, c.columns) - begin * kColumns;
        for (int64_t slot = 0; slot < now; ++slot) {
          const int64_t first = (done + slot) * kDepth, rows = std::min(kDepth, c.rows - first);
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t place = (first + r) * c.columns + begin * kColumns;
            for (int64_t i = 0; i < width && first + r + kDepth < c.rows; i += kLine / size)  // the next slot's, meanwhile
              __builtin_prefetch(static_cast<const char*>(c.dy) + (place + kDepth * c.columns + i) * size, 0, 2);
            float buffer[kStrips * kColumns];
            const float* row = load_row(c.dy, c.dy_dtype, place, width, buffer);
            for (int64_t i = 0; i < width; i += kColumns)
              copy_line(tiles.data + i / kColumns * kTile + r * kLine, row + i, width - i);
          }
          for (int64_t strip = begin; strip < end; ++strip)
            add_lines<Float32>(tiles.data + (strip - begin) * kTile, lists(slot), c.length,
                               sums.data + strip * c.length * kColumns, done + slot == 0, done + slot == blocks - 1, out, 0,
                               strip * kColumns);
        }
      }
    }
  }
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
