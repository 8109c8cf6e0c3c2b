// Compiled once per instruction set. Sums over rows are made in float32 over a few rows, then in float64, in parts whose number
// does not depend on the threads, so that neither do the results.
#include "bn_lif.h"

#include <algorithm>
#include <vector>

#include "convert.h"
#include "lif_rows.h"
#include "switches.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {
namespace {

constexpr int64_t kParts = 64;

// Two sums a channel: float32 for some rows, float64 for a part.
struct Sums {
  std::vector<float> few;
  double* all;  // [2, channels]
  int64_t channels, pending = 0;

  Sums(double* all, int64_t channels) : few(static_cast<size_t>(2 * channels)), all(all), channels(channels) {}
  ~Sums() { flush(); }
  float* at(int which, int64_t channel) { return few.data() + which * channels + channel; }
  void added(int64_t rows) {
    if ((pending += rows) >= 64) flush();
  }

 private:
  void flush() {
    for (size_t i = 0; i < few.size(); ++i) all[i] += static_cast<double>(few[i]);
    std::fill(few.begin(), few.end(), 0.0f);
    pending = 0;
  }
};

double total(const std::vector<double>& parts, int64_t each, int64_t at) {
  double sum = 0.0;
  for (size_t part = 0; part < parts.size(); part += static_cast<size_t>(each)) sum += parts[part + static_cast<size_t>(at)];
  return sum;
}

template <Surrogate kind, bool soft_reset, bool detach_reset>
void backward(const BnLifBackward& c) {
  const LifParams& p = c.params;
  const Recompute recompute = recompute_for(p);
  const int64_t n = c.rows * c.channels;
  const int64_t block = backward_block(c.steps);
  const int64_t segment = std::min(c.channels, block), rows_each = std::max<int64_t>(1, block / c.channels);
  const int64_t parts = std::min(kParts, c.rows);
  std::vector<double> sums(c.sums == nullptr ? 0 : static_cast<size_t>(parts * 2 * c.channels));
  const float *a = c.factors, *b = a + c.channels, *constant = b + c.channels;
#pragma omp parallel num_threads(team(c.threads, c.steps * n))
  {
    const auto h = scratch(c.steps * block), membrane = scratch(block);
    alignas(64) float x_buffer[kMaxBlock], ds_buffer[kMaxBlock], current[kMaxBlock], dv[kMaxBlock], dz[kMaxBlock];
#pragma omp for schedule(static)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t end = (part + 1) * c.rows / parts;
      const bool wanted = c.sums != nullptr;
      Sums mine(wanted ? sums.data() + part * 2 * c.channels : nullptr, wanted ? c.channels : 0);
      for (int64_t row = part * c.rows / parts; row < end; row += rows_each) {
        for (int64_t column = 0; column < c.channels; column += segment) {
          const int64_t rows = std::min(rows_each, end - row), channels = std::min(segment, c.channels - column);
          const int64_t width = rows * channels, first = row * c.channels + column, ahead = std::min(width, n - first - width);
          start(nullptr, p, first, width, membrane.get());
          for (int64_t t = 0; t < c.steps; ++t) {
            const int64_t at = t * n + first;
            prefetch_row(c.x, c.x_dtype, at + width, ahead);
            prefetch_row(c.ds, c.ds_dtype, at + width, ahead);
            const float* x = load_row(c.x, c.x_dtype, at, width, x_buffer);
            x = scaled_rows(x, c.scale + column, c.shift + column, channels, width, current);
            recompute(x, membrane.get(), h.get() + t * block, membrane.get(), width, p);
          }
          std::fill(dv, dv + width, 0.0f);
          for (int64_t t = c.steps - 1; t >= 0; --t) {
            const int64_t at = t * n + first;
            const float* ds = load_row(c.ds, c.ds_dtype, at, width, ds_buffer);
            backward_step<kind, soft_reset, detach_reset>(h.get() + t * block, ds, dv, dz, width, p);
            const float* x = load_row(c.x, c.x_dtype, at, width, x_buffer);
            float* dx = c.factors == nullptr ? nullptr : row_to_write(c.dx, c.x_dtype, at, current);
            for (int64_t r = 0; r < width; r += channels) {
              if (c.sums != nullptr) {
                float *plain = mine.at(0, column), *centred = mine.at(1, column);
                const float* mean = c.mean + column;
#pragma omp simd
                for (int64_t i = 0; i < channels; ++i) {
                  plain[i] += dz[r + i];
                  centred[i] += dz[r + i] * (x[r + i] - mean[i]);
                }
              }
              if (dx != nullptr) {
#pragma omp simd
                for (int64_t i = 0; i < channels; ++i)
                  dx[r + i] = a[column + i] * dz[r + i] + (b[column + i] * x[r + i] + constant[column + i]);
              }
            }
            if (dx != nullptr) store_row(c.dx, c.x_dtype, at, width, dx);
          }
        }
        mine.added(rows_each * c.steps);
      }
    }
  }
  if (c.sums == nullptr) return;
  for (int64_t i = 0; i < 2 * c.channels; ++i) c.sums[i] = static_cast<float>(total(sums, 2 * c.channels, i));
}

}  // namespace

// Sums of x and of its square are taken about the first row, which keeps them small beside a large mean.
void bn_stats(const BnStats& c) {
  const int64_t parts = std::min(kParts, c.rows);
  std::vector<double> sums(static_cast<size_t>(parts * 2 * c.channels));
  std::vector<float> buffer(static_cast<size_t>(c.channels));
  const float* first = load_row(c.x, c.x_dtype, 0, c.channels, buffer.data());
#pragma omp parallel for schedule(static) num_threads(team(c.threads, c.rows * c.channels))
  for (int64_t part = 0; part < parts; ++part) {
    Sums mine(sums.data() + part * 2 * c.channels, c.channels);
    std::vector<float> row_buffer(static_cast<size_t>(c.channels));
    for (int64_t row = part * c.rows / parts; row < (part + 1) * c.rows / parts; ++row) {
      const float* x = load_row(c.x, c.x_dtype, row * c.channels, c.channels, row_buffer.data());
      float *plain = mine.at(0, 0), *square = mine.at(1, 0);
#pragma omp simd
      for (int64_t i = 0; i < c.channels; ++i) {
        const float d = x[i] - first[i];
        plain[i] += d;
        square[i] += d * d;
      }
      mine.added(1);
    }
  }
  for (int64_t i = 0; i < c.channels; ++i) {
    const double count = static_cast<double>(c.rows), mean = total(sums, 2 * c.channels, i) / count;
    c.mean[i] = static_cast<float>(static_cast<double>(first[i]) + mean);
    c.var[i] = static_cast<float>(std::max(0.0, total(sums, 2 * c.channels, c.channels + i) / count - mean * mean));
  }
}

void bn_lif_backward(const BnLifBackward& c) {
  by_surrogate(c.surrogate, [&](auto kind) {
    by_flags(c.params.soft_reset, c.params.detach_reset, [&](auto soft_reset, auto detach_reset) {
      backward<decltype(kind)::value, decltype(soft_reset)::value, decltype(detach_reset)::value>(c);
    });
  });
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
