// dW of a convolution of 3 x 3 taps and stride 1: one list of the places at which a channel fired serves all taps, each of which
// sees it at an offset of its own into a tile of dy that has borders of zeros.
#pragma once

#include "spike_conv2d.h"
#include "weight_gradient.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {

// Rows of three taps that are summed at once, as the registers allow.
constexpr int kTapRows = kParts == 1 ? 3 : 1;

// Adds to `sums` [kTapRows, 3 lines] the lines that a list's spikes meet, from the tile's row on for the taps' last row.
inline void add_taps(const char* tile, int64_t pitch, const uint16_t* list, int64_t count, FloatVector* sums) {
  FloatVector a[kTapRows][3][kParts] = {};
  const auto each = [](auto f) {
#pragma GCC unroll 3
    for (int r = 0; r < kTapRows; ++r)
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k)
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) f(r, k, p);
  };
  for (int64_t i = 0; i < count; ++i)
    each([&](int r, int k, int p) {
      a[r][k][p] += *reinterpret_cast<const FloatVector*>(tile + list[i] * kUnit + (r * pitch + k) * kLine + p * kVector);
    });
  each([&](int r, int k, int p) { sums[(r * 3 + k) * kParts + p] += a[r][k][p]; });
}

// A block is some rows of one image, or some whole images. Line r * pitch + j of an image's part of a tile is dy at row
// r - 2 + pad, column j - 2 + pad as seen from the part's first spike, so that spike (r, j) meets tap (ky, kx) at line
// (r + 2 - ky) * pitch + j + 2 - kx.
struct TapGradient {
  static constexpr int64_t kColumns = Float32::kColumns, kTaps = 9;

  // Blocks of an image; 0: not even one row of it fits into a tile.
  static int64_t blocks_each(const Conv2d& s) {
    const int64_t most = kTileDepth / (s.width + 2) - 2;
    return most < 1 ? 0 : ceil_div(s.height, most);
  }

  static bool fits(const Conv2d& s) {
    return s.kernel_height == 3 && s.kernel_width == 3 && s.stride_height == 1 && s.stride_width == 1 && blocks_each(s) > 0;
  }

  const SpikeConv2dGrad& c;
  const Conv2d& s;
  int64_t pitch;           // lines of a tile's row: two more than the image is wide
  int64_t an_image, rows;  // blocks of an image, and its rows in each
  int64_t images;          // of a block
  Padded sums;             // [strips, channels, taps from the last on, kColumns]

  explicit TapGradient(const SpikeConv2dGrad& c)
      : c(c), s(c.shape), pitch(s.width + 2), an_image(blocks_each(s)), rows(ceil_div(s.height, an_image)),
        images(an_image > 1 ? 1 : std::clamp<int64_t>(s.batch, 1, kTileDepth / ((rows + 2) * pitch))),
        sums(nullptr, 0, strips() * c.channels * kTaps * kColumns) {}

  int64_t strips() const { return ceil_div(c.columns, kColumns); }
  int64_t inputs() const { return c.channels; }
  int64_t blocks() const { return ceil_div(s.batch, images) * an_image; }
  int64_t lines() const { return images * (rows + 2) * pitch; }
  int64_t ahead() const { return (an_image == 1 ? images * s.out_height : rows) * s.out_width; }
  int64_t stride() const { return words_per_row(c.channels); }
  int64_t scratch() const { return lines() * stride(); }
  int64_t bit_rows(int64_t) const { return lines(); }

  // f(line, image, row) for the first rows of a block's parts, where `line` begins the part.
  template <typename F>
  void each_part(int64_t block, F f) const {
    const int64_t first = block / an_image * images;
    for (int64_t i = 0; i < std::min(images, s.batch - first); ++i) f(i * (rows + 2) * pitch, first + i, block % an_image * rows);
  }

  // Pixels at the lines of their tile.
  const uint32_t* bits(int64_t block, uint32_t* out) const {
    std::fill(out, out + scratch(), 0u);
    each_part(block, [&](int64_t line, int64_t image, int64_t row) {
      for (int64_t r = 0; r < std::min(rows, s.height - row); ++r)
        memcpy(out + (line + r * pitch) * stride(), c.words + (image * s.height + row + r) * s.width * stride(),
               static_cast<size_t>(s.width * stride()) * sizeof(uint32_t));
    });
    return out;
  }

  // The same columns of every row, so that the others are zeros as they began.
  template <typename F>
  void each_run(int64_t block, F f) const {
    const int64_t left = std::max<int64_t>(0, 2 - s.pad_width), count = std::min(pitch, s.out_width + 2 - s.pad_width) - left;
    each_part(block, [&](int64_t line, int64_t image, int64_t row) {
      for (int64_t r = 0; r < rows + 2; ++r) {
        const int64_t y = row + r - 2 + s.pad_height;
        const bool inside = y >= 0 && y < s.out_height;
        f(line + r * pitch + left, inside ? (image * s.out_height + y) * s.out_width + left - 2 + s.pad_width : -1, count);
      }
    });
  }

  void add(const char* tile, const Lists& lists, int64_t, int64_t strip) {
    for (int64_t channel = 0; channel < c.channels; ++channel) {
      auto* sum = reinterpret_cast<FloatVector*>(sums.data + (strip * c.channels + channel) * kTaps * kColumns);
      for (int64_t r = 0; r < 3; r += kTapRows)
        add_taps(tile + r * pitch * kLine, pitch, lists.offsets + int64_t{4} * lists.start[channel], lists.events[channel],
                 sum + r * 3 * kParts);
    }
  }

  void write() const {
#pragma omp parallel for schedule(static) num_threads(c.threads)
    for (int64_t channel = 0; channel < c.channels; ++channel)
      for (int64_t tap = 0; tap < kTaps; ++tap)
        for (int64_t strip = 0; strip < strips(); ++strip)
          copy_line(c.dw + (tap * c.channels + channel) * c.columns + strip * kColumns,
                    sums.data + ((strip * c.channels + channel) * kTaps + kTaps - 1 - tap) * kColumns,
                    c.columns - strip * kColumns);
  }
};

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
