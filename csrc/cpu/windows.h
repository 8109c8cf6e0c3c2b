// Where the rows of a convolution come from: every output pixel's window of bits, gathered a panel at a time, at one bit a spike.
#pragma once

#include <string.h>

#include <algorithm>

#include "pack.h"
#include "spike_conv2d.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {

struct Windows {
  Conv2d shape;
  const uint32_t* words;
  int64_t channels;

  int64_t stride() const { return words_per_row(shape.kernel_height * shape.kernel_width * channels); }
  // One word more than the rows: the last window's shifted bits may spill zeros into it.
  int64_t scratch(int64_t rows) const { return rows * stride() + 1; }

  const uint32_t* rows(int64_t first, int64_t count, uint32_t* out) const {
    const Conv2d& s = shape;
    const int64_t pixel_words = words_per_row(channels);
    std::fill(out, out + scratch(count), 0u);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t pixel = first + i, x = pixel % s.out_width, y = pixel / s.out_width % s.out_height;
      const int64_t image = pixel / s.out_width / s.out_height;
      uint32_t* window = out + i * stride();
      int64_t bit = 0;
      for (int64_t ky = 0; ky < s.kernel_height; ++ky)
        for (int64_t kx = 0; kx < s.kernel_width; ++kx, bit += channels) {
          const int64_t row = y * s.stride_height - s.pad_height + ky, column = x * s.stride_width - s.pad_width + kx;
          if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
          copy_bits(words + ((image * s.height + row) * s.width + column) * pixel_words, pixel_words, window, bit);
        }
    }
    return out;
  }

  static void copy_bits(const uint32_t* from, int64_t count, uint32_t* window, int64_t bit) {
    uint32_t* to = window + bit / 32;
    const int shift = static_cast<int>(bit % 32);
    if (shift == 0) {
      memcpy(to, from, static_cast<size_t>(count) * 4);
      return;
    }
    for (int64_t w = 0; w < count; ++w) {
      const uint64_t bits = static_cast<uint64_t>(from[w]) << shift;
      to[w] |= static_cast<uint32_t>(bits);
      to[w + 1] |= static_cast<uint32_t>(bits >> 32);
    }
  }
};

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
