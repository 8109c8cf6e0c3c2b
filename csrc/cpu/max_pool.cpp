// Compiled once per instruction set. Rows are vectors of channels, at most kChannels at a time.
#include "max_pool.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "convert.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {
namespace {

constexpr int64_t kChannels = 512;

// Visits the places of one window that lie inside the image: (number in the window, row, column).
template <typename Visit>
void each_place(const PoolShape& s, int64_t out_row, int64_t out_column, Visit visit) {
  for (int64_t i = 0; i < s.size; ++i)
    for (int64_t j = 0; j < s.size; ++j) {
      const int64_t row = out_row * s.stride - s.padding + i, column = out_column * s.stride - s.padding + j;
      if (row >= 0 && row < s.height && column >= 0 && column < s.width) visit(i * s.size + j, row, column);
    }
}

// The first window that a row or column of the image lies in.
int64_t first_window(const PoolShape& s, int64_t place) {
  return std::max<int64_t>(0, (place + s.padding - s.size) / s.stride + (place + s.padding >= s.size));
}

}  // namespace

void max_pool(const MaxPool& c) {
  const PoolShape& s = c.shape;
#pragma omp parallel for schedule(static) num_threads(c.threads) collapse(2)
  for (int64_t image = 0; image < s.images; ++image)
    for (int64_t out_row = 0; out_row < s.out_height; ++out_row) {
      alignas(64) float best[kChannels], sign[kChannels], buffer[kChannels];
      alignas(64) int32_t where[kChannels];
      for (int64_t first = 0; first < s.channels; first += kChannels) {
        const int64_t count = std::min(kChannels, s.channels - first);
        for (int64_t i = 0; i < count; ++i) sign[i] = c.scale[first + i] < 0.0f ? -1.0f : 1.0f;
        for (int64_t out_column = 0; out_column < s.out_width; ++out_column) {
          bool fresh = true;
          each_place(s, out_row, out_column, [&](int64_t place, int64_t row, int64_t column) {
            const int64_t at = ((image * s.height + row) * s.width + column) * s.channels + first;
            const float* x = load_row(c.x, c.dtype, at, count, buffer);
            const int32_t number = static_cast<int32_t>(place);
            if (fresh) {
#pragma omp simd
              for (int64_t i = 0; i < count; ++i) best[i] = x[i] * sign[i], where[i] = number;
              fresh = false;
              return;
            }
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) {
              const float value = x[i] * sign[i];
              const bool take = value > best[i] || value != value;
              best[i] = take ? value : best[i];
              where[i] = take ? number : where[i];
            }
          });
          const int64_t to = ((image * s.out_height + out_row) * s.out_width + out_column) * s.channels + first;
          float* values = row_to_write(c.values, c.dtype, to, best);
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) values[i] = best[i] * sign[i];
          store_row(c.values, c.dtype, to, count, values);
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) c.index[to + i] = static_cast<uint8_t>(where[i]);
        }
      }
    }
}

// A pixel gathers from the windows that it lies in, so that dx is written once.
void max_pool_grad(const MaxPoolGrad& c) {
  const PoolShape& s = c.shape;
#pragma omp parallel num_threads(c.threads)
  {
    std::vector<float> row_buffer(static_cast<size_t>(s.channels)), x_buffer(row_buffer), d_buffer(row_buffer);
#pragma omp for schedule(static) collapse(2)
    for (int64_t image = 0; image < s.images; ++image)
      for (int64_t row = 0; row < s.height; ++row) {
        const int64_t row_end = std::min(s.out_height, (row + s.padding) / s.stride + 1);
        for (int64_t column = 0; column < s.width; ++column) {
          const int64_t column_end = std::min(s.out_width, (column + s.padding) / s.stride + 1);
          const int64_t at = ((image * s.height + row) * s.width + column) * s.channels;
          float* dx = row_to_write(c.dx, c.dtype, at, row_buffer.data());
          if (c.factors == nullptr) {
            std::fill(dx, dx + s.channels, 0.0f);
          } else {
            const float *b = c.factors, *constant = b + s.channels;
            const float* x = load_row(c.x, c.dtype, at, s.channels, x_buffer.data());
#pragma omp simd
            for (int64_t i = 0; i < s.channels; ++i) dx[i] = b[i] * x[i] + constant[i];
          }
          for (int64_t out_row = first_window(s, row); out_row < row_end; ++out_row)
            for (int64_t out_column = first_window(s, column); out_column < column_end; ++out_column) {
              const int64_t from = ((image * s.out_height + out_row) * s.out_width + out_column) * s.channels;
              const int64_t down = row - (out_row * s.stride - s.padding), right = column - (out_column * s.stride - s.padding);
              const float* d = load_row(c.dvalues, c.dtype, from, s.channels, d_buffer.data());
              const uint8_t number = static_cast<uint8_t>(down * s.size + right), *index = c.index + from;
#pragma omp simd
              for (int64_t i = 0; i < s.channels; ++i) dx[i] += index[i] == number ? d[i] : 0.0f;
            }
          store_row(c.dx, c.dtype, at, s.channels, dx);
        }
      }
  }
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
