// Compiled once per instruction set. Winograd's F(4x4, 3x3) (Lavin and Gray 2016, arXiv 1509.09308): 36 products make 4x4 pixels
// in place of 144. The points are 0, +-3/4, +-3/2 and infinity, which lose less than half of what the usual 0, +-1, +-2 do: an
// error of about 6 times that of a direct sum in float32. What is not finite spreads over its tiles.
//
// A thread walks panels of tiles: it transforms their 6x6 patches of dy, then for every strip of dx's channels multiplies at
// each of the 36 places and transforms back, while the strip's products are in the second-level cache.
#include "winograd.h"

#include <algorithm>

#include "convert.h"
#include "dense_rows.h"
#include "events.h"
#include "threads.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {
namespace {

constexpr int kIn = 6, kOut = 4, kPlaces = kIn * kIn;
constexpr int64_t kPanel = 56 / kRows * kRows;  // tiles
constexpr float kA = 0.75f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;

// Six values of dy to what is multiplied.
inline void transform_in(const FloatVector* d, FloatVector* out) {
  const FloatVector even_a = fused(all(-kB2), d[2], d[4]), odd_a = all(kA) * fused(all(-kB2), d[1], d[3]);
  const FloatVector even_b = fused(all(-kA2), d[2], d[4]), odd_b = all(kB) * fused(all(-kA2), d[1], d[3]);
  out[0] = fused(all(kA2 * kB2), d[0], fused(all(-kA2 - kB2), d[2], d[4]));
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
  out[5] = fused(all(kA2 * kB2), d[1], fused(all(-kA2 - kB2), d[3], d[5]));
}

// Six products to four values of dx.
inline void transform_out(const FloatVector* m, FloatVector* out) {
  const FloatVector sum_a = m[1] + m[2], odd_a = m[1] - m[2], sum_b = m[3] + m[4], odd_b = m[3] - m[4];
  out[0] = m[0] + sum_a + sum_b;
  out[1] = fused(all(kA), odd_a, all(kB) * odd_b);
  out[2] = fused(all(kA2), sum_a, all(kB2) * sum_b);
  out[3] = fused(all(kA2 * kA), odd_a, fused(all(kB2 * kB), odd_b, m[5]));
}

// Three weights to what is multiplied, by the six rows of G.
inline void transform_weights(const double* g, double* out) {
  constexpr double a = kA, b = kB, a2 = a * a, b2 = b * b;
  const double of_a = 1.0 / (2.0 * a2 * (a2 - b2)), of_b = 1.0 / (2.0 * b2 * (b2 - a2));
  out[0] = g[0] / (a2 * b2);
  out[1] = of_a * (g[0] + a * g[1] + a2 * g[2]);
  out[2] = of_a * (g[0] - a * g[1] + a2 * g[2]);
  out[3] = of_b * (g[0] + b * g[1] + b2 * g[2]);
  out[4] = of_b * (g[0] - b * g[1] + b2 * g[2]);
  out[5] = g[2];
}

// [strips, 36, columns, kStrip], of the weights turned by half a turn.
void transform_all_weights(const WinogradGradient& c, float* to) {
  const int64_t strips = ceil_div(c.channels, kStrip);
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (int64_t column = 0; column < c.columns; ++column)
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t first = strip * kStrip, count = std::min<int64_t>(kStrip, c.channels - first);
      alignas(kLine) float values[kPlaces][kStrip] = {};
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        double rows[kIn][3], g[3], out[kIn];
        for (int x = 0; x < 3; ++x) {
          for (int y = 0; y < 3; ++y) g[y] = c.w[((column * 3 + 2 - y) * 3 + 2 - x) * c.channels + first + i];
          transform_weights(g, out);
          for (int y = 0; y < kIn; ++y) rows[y][x] = out[y];
        }
        for (int y = 0; y < kIn; ++y) {
          transform_weights(rows[y], out);
          for (int x = 0; x < kIn; ++x) values[y * kIn + x][i] = static_cast<float>(out[x]);
        }
      }
      for (int place = 0; place < kPlaces; ++place)
        memcpy(to + ((strip * kPlaces + place) * c.columns + column) * kStrip, values[place], sizeof values[place]);
    }
}

struct Tile {
  int64_t image, y, x;  // of dx
};

struct Worker {
  const WinogradGradient& c;
  const float* weights;  // transformed
  int64_t across, down, stride;
  StripWriter dx;
  float *patches, *products, *rows;  // [36, kPanel, stride], [36, kPanel, kStrip], [37, stride], the last of zeros

  static int64_t row_stride(int64_t columns) { return ceil_div(columns, 16) * 16 + 16; }  // never a power of two of lines
  static int64_t scratch(int64_t columns) {
    return kPlaces * kPanel * (row_stride(columns) + kStrip) + (kPlaces + 1) * row_stride(columns);
  }

  Worker(const WinogradGradient& c, const float* weights, float* scratch)
      : c(c), weights(weights), across(ceil_div(c.width, kOut)), down(ceil_div(c.height, kOut)), stride(row_stride(c.columns)),
        dx(c.dx, c.dtype, c.batch * c.height * c.width, c.channels), patches(scratch),
        products(patches + kPlaces * kPanel * stride), rows(products + kPlaces * kPanel * kStrip) {
    std::fill_n(rows + kPlaces * stride, stride, 0.0f);
  }

  Tile tile(int64_t i) const { return {i / across / down, i / across % down * kOut, i % across * kOut}; }

  void run(int64_t first, int64_t count) const {
    const int64_t padded = ceil_div(count, kRows) * kRows;
    for (int64_t i = 0; i < padded; ++i) i < count ? take(tile(first + i), i) : clear(i);
    for (int64_t channel = 0; channel < c.channels; channel += kStrip) {
      const float* strips = weights + channel / kStrip * kPlaces * c.columns * kStrip;
      for (int place = 0; place < kPlaces; ++place) {
        const float *strip = strips + place * c.columns * kStrip, *next = strip + c.columns * kStrip;
        for (int64_t i = 0; i < padded; i += kRows) {
          const PlainRows from{patches + (place * kPanel + i) * stride, stride};
          const float* soon = share_of(next, i, c.columns);
          float* to = products + (place * kPanel + i) * kStrip;
          if (c.channels - channel > kLanes)
            multiply_rows<2, false>(from, strip, c.columns, to, soon);
          else
            multiply_rows<1, false>(from, strip, c.columns, to, soon);
        }
      }
      for (int64_t i = 0; i < count; ++i) give(tile(first + i), i, channel);
    }
  }

  void clear(int64_t i) const {
    for (int place = 0; place < kPlaces; ++place) std::fill_n(patches + (place * kPanel + i) * stride, stride, 0.0f);
  }

  // Pixel (y, x) of dy, to be read in whole vectors.
  const float* pixel(int64_t image, int64_t y, int64_t x, float* buffer) const {
    if (y < 0 || y >= c.out_height || x < 0 || x >= c.out_width) return rows + kPlaces * stride;
    const int64_t at = ((image * c.out_height + y) * c.out_width + x) * c.columns;
    const float* here = load_row(c.dy, c.dtype, at, c.columns, buffer);
    if (here == buffer || c.columns % kLanes == 0) return here;
    std::copy(here, here + c.columns, buffer);
    return buffer;
  }

  // The patch under a tile, transformed, becomes row i of the 36 places.
  void take(Tile tile, int64_t i) const {
    const float* from[kPlaces];
    const int64_t top = tile.y + c.pad_height - 2, left = tile.x + c.pad_width - 2;
    for (int place = 0; place < kPlaces; ++place)
      from[place] = pixel(tile.image, top + place / kIn, left + place % kIn, rows + place * stride);
    for (int64_t k = 0; k < c.columns; k += kLanes) {
      FloatVector half[kIn][kIn], column[kIn], out[kIn];
      for (int x = 0; x < kIn; ++x) {
        for (int y = 0; y < kIn; ++y) column[y] = load(from[y * kIn + x] + k);
        transform_in(column, out);
        for (int y = 0; y < kIn; ++y) half[y][x] = out[y];
      }
      for (int y = 0; y < kIn; ++y) {
        transform_in(half[y], out);
        for (int x = 0; x < kIn; ++x)
          memcpy(patches + ((y * kIn + x) * kPanel + i) * stride + k, &out[x], sizeof(FloatVector));
      }
    }
  }

  // Row i of the 36 products, transformed back, becomes a tile's pixels.
  void give(Tile tile, int64_t i, int64_t channel) const {
    const int64_t width = std::min<int64_t>(kStrip, c.channels - channel);
    alignas(kLine) float pixels[kOut][kOut][kStrip];
    for (int64_t first = 0; first < width; first += kLanes) {
      const float* from = products + i * kStrip + first;
      FloatVector half[kOut][kIn], column[kIn], out[kOut];
      for (int x = 0; x < kIn; ++x) {
        for (int y = 0; y < kIn; ++y) column[y] = load(from + (y * kIn + x) * kPanel * kStrip);
        transform_out(column, out);
        for (int y = 0; y < kOut; ++y) half[y][x] = out[y];
      }
      for (int y = 0; y < kOut; ++y) {
        transform_out(half[y], out);
        for (int x = 0; x < kOut; ++x) memcpy(pixels[y][x] + first, &out[x], sizeof(FloatVector));
      }
    }
    const int64_t wide = std::min<int64_t>(kOut, c.width - tile.x), high = std::min<int64_t>(kOut, c.height - tile.y);
    for (int64_t y = 0; y < high; ++y)
      for (int64_t x = 0; x < wide; ++x) {
        const int64_t at = ((tile.image * c.height + tile.y + y) * c.width + tile.x + x) * c.channels + channel;
        dx.write(at, width, pixels[y][x]);
      }
  }
};

}  // namespace

void winograd_gradient(const WinogradGradient& c) {
  const AlignedArray<float> weights(kPlaces * c.columns * ceil_div(c.channels, kStrip) * kStrip);
  transform_all_weights(c, weights.data);
  const int64_t tiles = c.batch * ceil_div(c.height, kOut) * ceil_div(c.width, kOut);
  const int64_t panel = std::min(kPanel, ceil_div(ceil_div(tiles, c.threads), kRows) * kRows), panels = ceil_div(tiles, panel);
  const int threads = static_cast<int>(std::min<int64_t>(c.threads, panels));
  const int64_t each = Worker::scratch(c.columns);
  const AlignedArray<float> scratch(threads * each);
#pragma omp parallel num_threads(threads)
  {
    const Worker worker(c, weights.data, scratch.data + thread_index() * each);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < panels; ++i) worker.run(i * panel, std::min(panel, tiles - i * panel));
  }
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
