// Where the rows of a convolution come from: every output pixel's window of bits.
#pragma once

#include <string.h>

#include <algorithm>
#include <vector>

#include "events.h"
#include "pack.h"
#include "spike_conv2d.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {

typedef uint16_t LooseShorts __attribute__((vector_size(kVector), may_alias, aligned(2)));

struct Windows {
  Conv2d shape;
  const uint32_t* words;
  int64_t channels;

  int64_t stride() const { return words_per_row(shape.kernel_height * shape.kernel_width * channels); }
  double density() const { return density_of(words, shape.batch * shape.height * shape.width, channels); }
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

  // The pixels under a panel's windows, each decoded once; a window's list is its pixels' lists, moved to where their taps lie.
  struct Panel {
    const Windows* source;
    int64_t first, count;
    int64_t pixels_first;            // the first pixel decoded
    std::vector<uint16_t> offsets;   // of every part of every pixel, from the part's first line
    std::vector<int32_t> starts;     // [parts, pixels + 1], into offsets

    int64_t events() const {
      const int64_t taps = source->shape.kernel_height * source->shape.kernel_width;
      return taps * static_cast<int64_t>(offsets.size());
    }

    template <typename Meanwhile = Nothing>
    void decode(const Tiles& tiles, Span span, Lists& lists, Meanwhile meanwhile = {}) const {
      const Conv2d& s = source->shape;
      const int64_t parts = tiles.parts(), taps = s.kernel_height * s.kernel_width;
      const int64_t pixels = static_cast<int64_t>(starts.size()) / parts;
      struct Place {
        int64_t down, right;
        const int32_t* start;
        uint16_t line;
      };
      std::vector<Place> places;
      for (int64_t block = span.first; block < span.end; ++block) {
        const int64_t first_tap = parts > 1 ? block / parts : block * tiles.group();
        const int64_t end = parts > 1 ? first_tap + 1 : std::min(taps, first_tap + tiles.group());
        for (int64_t tap = first_tap; tap < end; ++tap)
          places.push_back({tap / s.kernel_width - s.pad_height, tap % s.kernel_width - s.pad_width,
                            starts.data() + block % parts * pixels,
                            static_cast<uint16_t>(tiles.line(span, block) + (tap - first_tap) * source->channels * kLineUnits)});
      }
      int64_t x = first % s.out_width, y = first / s.out_width % s.out_height, image = first / s.out_width / s.out_height;
      lists.fill(count, tiles.zeros(span), [&](int64_t, uint16_t* list) {
        meanwhile();
        const int64_t top = y * s.stride_height, left = x * s.stride_width;
        const int64_t origin = (image * s.height + top) * s.width + left - pixels_first;
        int64_t length = 0;
        for (const Place& place : places) {
          const uint64_t row = static_cast<uint64_t>(top + place.down), column = static_cast<uint64_t>(left + place.right);
          if (row >= static_cast<uint64_t>(s.height) || column >= static_cast<uint64_t>(s.width)) continue;
          const int32_t* from = place.start + origin + place.down * s.width + place.right;
          append(list + length, offsets.data() + from[0], from[1] - from[0], place.line);
          length += from[1] - from[0];
        }
        if (++x == s.out_width) {
          x = 0;
          if (++y == s.out_height) y = 0, ++image;
        }
        return length;
      });
    }

    static void append(uint16_t* to, const uint16_t* from, int64_t number, uint16_t base) {
      for (int64_t i = 0; i < number; i += kVector / 2)
        *reinterpret_cast<LooseShorts*>(to + i) = *reinterpret_cast<const LooseShorts*>(from + i) + base;
    }
  };

  Panel panel(const Tiles& tiles, int64_t first, int64_t count) const {
    const Conv2d& s = shape;
    const auto image_row = [&](int64_t pixel, int64_t ky) {
      const int64_t y = pixel / s.out_width % s.out_height * s.stride_height - s.pad_height + ky;
      return pixel / s.out_width / s.out_height * s.height + std::clamp<int64_t>(y, 0, s.height);
    };
    Panel panel{this, first, count, image_row(first, 0) * s.width, {}, {}};
    const int64_t pixels = image_row(first + count - 1, s.kernel_height) * s.width - panel.pixels_first;
    const int64_t parts = tiles.parts(), words_each = words_per_row(channels);
    const auto* bits = reinterpret_cast<const uint8_t*>(words + panel.pixels_first * words_each);
    const int64_t events = SPIKECLIP_ISA::count(words + panel.pixels_first * words_each, pixels * words_each);
    panel.offsets.resize(static_cast<size_t>(events + kSpill));
    panel.starts.resize(static_cast<size_t>(parts * (pixels + 1)));
    int64_t end = 0;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t from = parts > 1 ? part * tiles.part() : 0, length = parts > 1 ? std::min(tiles.part(), channels - from) : channels;
      int32_t* start = panel.starts.data() + part * (pixels + 1);
      for (int64_t p = 0; p < pixels; ++p) {
        start[p] = static_cast<int32_t>(end);
        end += decode_bits(bits + 4 * p * words_each + from / 8, ceil_div(length, 8), 0, panel.offsets.data() + end);
      }
      start[pixels] = static_cast<int32_t>(end);
    }
    return panel;
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
