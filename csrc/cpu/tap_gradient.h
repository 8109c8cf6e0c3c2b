// dW of a convolution of 3 x 3 taps and stride 1, event-driven: one list of the places at which a channel fired serves all taps,
// each of which sees it at an offset of its own into a tile of dy that has borders of zeros.
#pragma once

#include <string.h>

#include <algorithm>

#include "events.h"
#include "spike_conv2d.h"
#include "transpose.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {

// The spikes in blocks: some rows of one image, or some whole images. Line r * pitch + j of an image's part of a tile is dy at row
// r - 2 + pad, column j - 2 + pad as seen from the part's first spike, so that spike (r, j) meets tap (ky, kx) at line
// (r + 2 - ky) * pitch + j + 2 - kx.
struct Bands {
  const Conv2d& s;
  int64_t pitch;                  // lines of a tile's row: two more than the image is wide
  int64_t an_image = 0;           // blocks of an image; 0: not even one row of it fits
  int64_t rows = 0, images = 1;   // image rows and images of a block

  explicit Bands(const Conv2d& s) : s(s), pitch(s.width + 2) {
    const int64_t most = kTileDepth / pitch - 2;
    if (most < 1) return;
    an_image = ceil_div(s.height, most);
    rows = ceil_div(s.height, an_image);
    if (an_image == 1) images = std::clamp<int64_t>(s.batch, 1, kTileDepth / ((rows + 2) * pitch));
  }

  bool fit() const {
    return s.kernel_height == 3 && s.kernel_width == 3 && s.stride_height == 1 && s.stride_width == 1 && an_image > 0;
  }
  int64_t number() const { return ceil_div(s.batch, images) * an_image; }
  int64_t lines() const { return images * (rows + 2) * pitch; }

  // f(line, image, row) for the first rows of a block's parts, where `line` begins the part.
  template <typename F>
  void each_part(int64_t block, F f) const {
    const int64_t first = block / an_image * images;
    for (int64_t i = 0; i < std::min(images, s.batch - first); ++i) f(i * (rows + 2) * pitch, first + i, block % an_image * rows);
  }

  // A block's bits, pixels at the lines of their tile.
  void gather(const uint32_t* words, int64_t stride, int64_t block, uint32_t* out) const {
    std::fill(out, out + lines() * stride, 0u);
    each_part(block, [&](int64_t line, int64_t image, int64_t row) {
      for (int64_t r = 0; r < std::min(rows, s.height - row); ++r)
        memcpy(out + (line + r * pitch) * stride, words + (image * s.height + row + r) * s.width * stride,
               static_cast<size_t>(s.width * stride) * sizeof(uint32_t));
    });
  }

  // f(line, pixel, count) for lines that are `count` pixels of dy side by side, pixel -1 for zeros; the other lines always are.
  template <typename F>
  void each_row(int64_t block, F f) const {
    const int64_t left = std::max<int64_t>(0, 2 - s.pad_width), count = std::min(pitch, s.out_width + 2 - s.pad_width) - left;
    each_part(block, [&](int64_t line, int64_t image, int64_t row) {
      for (int64_t r = 0; r < rows + 2; ++r) {
        const int64_t y = row + r - 2 + s.pad_height;
        const bool inside = y >= 0 && y < s.out_height;
        f(line + r * pitch + left, inside ? (image * s.out_height + y) * s.out_width + left - 2 + s.pad_width : -1, count);
      }
    });
  }
};

// Rows of three taps that are summed at once, as the registers allow.
constexpr int kTapRows = kParts == 1 ? 3 : 1;

// Adds to `sums` [kTapRows, 3 lines] the lines that a list's spikes meet, from the tile's row on for the taps' last row.
inline void add_taps(const char* tile, int64_t pitch, const uint16_t* list, int64_t count, FloatVector* sums) {
  FloatVector a[kTapRows][3][kParts] = {};
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 3
    for (int r = 0; r < kTapRows; ++r)
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k)
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p)
          a[r][k][p] += *reinterpret_cast<const FloatVector*>(tile + list[i] + (r * pitch + k) * kLine + p * kVector);
  }
#pragma GCC unroll 3
  for (int r = 0; r < kTapRows; ++r)
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k)
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) sums[(r * 3 + k) * kParts + p] += a[r][k][p];
}

// Blocks are summed one after the other, whatever the number of threads.
inline void tap_gradient(const SpikeConv2dGrad& c) {
  constexpr int64_t kColumns = Float32::kColumns, kBlocksAtOnce = 24;
  constexpr int64_t kStrips = 4, kTile = kTileDepth * kLine;  // strips of dy that a thread reads together, and bytes of each
  const Bands bands(c.shape);
  const int64_t lines = bands.lines(), stride = words_per_row(c.channels), padded = ceil_div(c.channels, 64) * 64;
  const int64_t width = ceil_div(lines, 64), blocks = bands.number(), at_once = std::min(blocks, kBlocksAtOnce);
  const int64_t strips = ceil_div(c.columns, kColumns), together = std::clamp<int64_t>(strips / (2 * c.threads), 1, kStrips);
  const int64_t list_size = Lists::capacity(padded, lines), size = c.dy_dtype == Dtype::f32 ? 4 : 2;
  const int64_t ahead = (bands.an_image == 1 ? bands.images * c.shape.out_height : bands.rows) * c.shape.out_width;
  const int64_t pixels = c.shape.batch * c.shape.out_height * c.shape.out_width;
  const AlignedArray<uint16_t> offsets(at_once * list_size);
  const AlignedArray<int32_t> starts(at_once * (padded + 1)), events(at_once * padded);
  const Padded sums(nullptr, 0, strips * c.channels * 9 * kColumns);  // [strips, channels, taps from the last on, kColumns]
  const auto lists = [&](int64_t slot) {
    return Lists{offsets.data + slot * list_size, starts.data + slot * (padded + 1), events.data + slot * padded};
  };
  for (int64_t done = 0; done < blocks; done += at_once) {
    const int64_t now = std::min(at_once, blocks - done);
#pragma omp parallel num_threads(c.threads)
    {
      const AlignedArray<uint32_t> bits(lines * stride);
      const AlignedArray<uint64_t> columns(padded * width);
#pragma omp for schedule(dynamic, 1)
      for (int64_t slot = 0; slot < now; ++slot) {
        bands.gather(c.words, stride, done + slot, bits.data);
        transpose_bits(bits.data, stride, lines, c.channels, columns.data, width);
        lists(slot).fill(c.channels, 0, [&](int64_t channel, uint16_t* list) {
          return decode_bits(reinterpret_cast<const uint8_t*>(columns.data + channel * width), ceil_div(lines, 8), 0, list);
        });
      }
      const AlignedArray<char> tiles(together * kTile);
      memset(tiles.data, 0, static_cast<size_t>(together * kTile));
#pragma omp for schedule(dynamic, 1)
      for (int64_t begin = 0; begin < strips; begin += together) {
        const int64_t end = std::min(strips, begin + together), wide = std::min(end * kColumns, c.columns) - begin * kColumns;
        for (int64_t slot = 0; slot < now; ++slot) {
          bands.each_row(done + slot, [&](int64_t line, int64_t pixel, int64_t count) {
            char* to = tiles.data + line * kLine;
            if (pixel < 0) {
              for (int64_t i = 0; i < end - begin; ++i) memset(to + i * kTile, 0, static_cast<size_t>(count) * kLine);
              return;
            }
            for (int64_t n = 0; n < count; ++n, to += kLine) {
              const int64_t place = (pixel + n) * c.columns + begin * kColumns;
              for (int64_t i = 0; i < wide && pixel + n + ahead < pixels; i += kLine / size)  // the next block's, meanwhile
                __builtin_prefetch(static_cast<const char*>(c.dy) + (place + ahead * c.columns + i) * size, 0, 2);
              float buffer[kStrips * kColumns];
              const float* from = load_row(c.dy, c.dy_dtype, place, wide, buffer);
              for (int64_t i = 0; i < wide; i += kColumns) copy_line(to + i / kColumns * kTile, from + i, wide - i);
            }
          });
          const Lists list = lists(slot);
          for (int64_t strip = begin; strip < end; ++strip)
            for (int64_t channel = 0; channel < c.channels; ++channel) {
              auto* sum = reinterpret_cast<FloatVector*>(sums.data + (strip * c.channels + channel) * 9 * kColumns);
              for (int64_t r = 0; r < 3; r += kTapRows)
                add_taps(tiles.data + (strip - begin) * kTile + r * bands.pitch * kLine, bands.pitch,
                         list.offsets + int64_t{4} * list.start[channel], list.events[channel], sum + r * 3 * kParts);
            }
        }
      }
    }
  }
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (int64_t channel = 0; channel < c.channels; ++channel)
    for (int64_t tap = 0; tap < 9; ++tap)
      for (int64_t strip = 0; strip < strips; ++strip)
        memcpy(c.dw + (tap * c.channels + channel) * c.columns + strip * kColumns,
               sums.data + ((strip * c.channels + channel) * 9 + 8 - tap) * kColumns,
               static_cast<size_t>(std::min(kColumns, c.columns - strip * kColumns)) * sizeof(float));
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
