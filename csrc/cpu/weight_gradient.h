// dW = spikes^T dy, event-driven: spikes transposed, the places become what a list names, and an input's rows of dW add the lines
// of dy at the places where it fired.
#pragma once

#include <string.h>

#include <algorithm>

#include "events.h"
#include "pack.h"
#include "transpose.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {

struct WeightGradient {
  int64_t columns;
  const void* dy;  // [pixels, columns]
  Dtype dy_dtype;
  int64_t pixels;
  int threads;
};

constexpr int64_t kStripsTogether = 4;  // of dy, which a thread reads together

// A block's tiles, `tile` bytes each, for strips `begin` to `end` of columns.
template <typename Plan>
void fill_tiles(const WeightGradient& c, const Plan& plan, int64_t block, int64_t begin, int64_t end, char* tiles, int64_t tile) {
  constexpr int64_t kColumns = Float32::kColumns;
  const int64_t wide = std::min(end * kColumns, c.columns) - begin * kColumns, ahead = plan.ahead();
  const int64_t size = c.dy_dtype == Dtype::f32 ? 4 : 2;
  plan.each_run(block, [&](int64_t line, int64_t pixel, int64_t count) {
    char* to = tiles + line * kLine;
    if (pixel < 0) {
      for (int64_t i = 0; i < end - begin; ++i) memset(to + i * tile, 0, static_cast<size_t>(count) * kLine);
      return;
    }
    for (int64_t n = 0; n < count; ++n, to += kLine) {
      const int64_t place = (pixel + n) * c.columns + begin * kColumns;
      for (int64_t i = 0; i < wide && pixel + n + ahead < c.pixels; i += kLine / size)  // the next block's, meanwhile
        __builtin_prefetch(static_cast<const char*>(c.dy) + (place + ahead * c.columns + i) * size, 0, 2);
      float buffer[kStripsTogether * kColumns];
      const float* from = load_row(c.dy, c.dy_dtype, place, wide, buffer);
      for (int64_t i = 0; i < wide; i += kColumns) copy_line(to + i / kColumns * tile, from + i, wide - i);
    }
  });
}

// A plan takes the spikes in blocks, which are summed one after the other, whatever the number of threads. It says
//   inputs, blocks:   how many there are
//   lines:            of a block's tile of dy, at most
//   ahead:            how many pixels further the next block's pixels lie
//   stride, scratch:  words of one row of bits; words that `bits` may write
//   bits(block, scratch), bit_rows(block):  the spikes, row by row, and how many rows
//   each_run(block, f):  f(line, pixel, count) for lines of the tile that are `count` pixels side by side; pixel -1: zeros
//   add(tile, lists, block, strip):  the lines that the inputs' lists name, for one strip of columns
template <typename Plan>
void weight_gradient(const WeightGradient& c, Plan& plan) {
  constexpr int64_t kBlocksAtOnce = 24;
  const int64_t strips = ceil_div(c.columns, Float32::kColumns);
  const int64_t together = std::clamp<int64_t>(strips / (2 * c.threads), 1, kStripsTogether);
  const int64_t inputs = plan.inputs(), padded = ceil_div(inputs, 64) * 64, lines = plan.lines(), width = ceil_div(lines, 64);
  const int64_t blocks = plan.blocks(), at_once = std::min(blocks, kBlocksAtOnce), list_size = Lists::capacity(padded, lines);
  const int64_t tile = (lines + 1) * kLine;  // bytes
  const AlignedArray<uint16_t> offsets(at_once * list_size);
  const AlignedArray<int32_t> starts(at_once * (padded + 1)), events(at_once * padded);
  const auto lists = [&](int64_t slot) {
    return Lists{offsets.data + slot * list_size, starts.data + slot * (padded + 1), events.data + slot * padded};
  };
  for (int64_t done = 0; done < blocks; done += at_once) {
    const int64_t now = std::min(at_once, blocks - done);
#pragma omp parallel num_threads(c.threads)
    {
      const AlignedArray<uint32_t> scratch(plan.scratch());
      const AlignedArray<uint64_t> columns(padded * width);
#pragma omp for schedule(dynamic, 1)
      for (int64_t slot = 0; slot < now; ++slot) {
        const int64_t rows = plan.bit_rows(done + slot);
        transpose_bits(plan.bits(done + slot, scratch.data), plan.stride(), rows, inputs, columns.data, width);
        lists(slot).fill(inputs, static_cast<uint16_t>(lines * kLineUnits), [&](int64_t input, uint16_t* list) {
          return decode_bits(reinterpret_cast<const uint8_t*>(columns.data + input * width), ceil_div(rows, 8), 0, list);
        });
      }
      const AlignedArray<char> tiles(together * tile);
      memset(tiles.data, 0, static_cast<size_t>(together * tile));
#pragma omp for schedule(dynamic, 1)
      for (int64_t begin = 0; begin < strips; begin += together) {
        const int64_t end = std::min(strips, begin + together);
        for (int64_t slot = 0; slot < now; ++slot) {
          fill_tiles(c, plan, done + slot, begin, end, tiles.data, tile);
          for (int64_t strip = begin; strip < end; ++strip)
            plan.add(tiles.data + (strip - begin) * tile, lists(slot), done + slot, strip);
        }
      }
    }
  }
}

// One row of dW for every input of rows of spikes, which `source` gives.
template <typename Source>
struct RowGradient {
  static constexpr int64_t kDepth = 384;  // rows of a block

  const Source& source;
  int64_t rows, length;
  Padded zeros;
  Output out;
  AlignedArray<float> sums;  // [strips, length, columns of a strip]

  RowGradient(const Source& source, int64_t rows, int64_t length, int64_t columns, float* dw)
      : source(source), rows(rows), length(length), zeros(nullptr, 0, ceil_div(columns, Float32::kColumns) * Float32::kColumns),
        out{dw, Dtype::f32, columns, nullptr, zeros.data, false},
        sums(ceil_div(columns, Float32::kColumns) * length * Float32::kColumns) {}

  int64_t inputs() const { return length; }
  int64_t blocks() const { return ceil_div(rows, kDepth); }
  int64_t lines() const { return kDepth; }
  int64_t ahead() const { return kDepth; }
  int64_t stride() const { return source.stride(); }
  int64_t scratch() const { return source.scratch(kDepth); }
  int64_t bit_rows(int64_t block) const { return std::min(kDepth, rows - block * kDepth); }
  const uint32_t* bits(int64_t block, uint32_t* scratch) const { return source.rows(block * kDepth, bit_rows(block), scratch); }

  template <typename F>
  void each_run(int64_t block, F f) const {
    f(0, block * kDepth, bit_rows(block));
  }

  void add(const char* tile, const Lists& lists, int64_t block, int64_t strip) {
    float* mine = sums.data + strip * length * Float32::kColumns;
    add_lines<Float32>(tile, lists, length, block == 0 ? nullptr : mine, block == blocks() - 1 ? nullptr : mine, out, 0,
                       strip * Float32::kColumns);
  }
};

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
