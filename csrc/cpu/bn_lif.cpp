// Compiled once per instruction set. Sums over rows are made in float32 over a few rows, then in float64, in parts whose number
// does not depend on the threads, so that neither do the results.
#include "bn_lif.h"

#include <algorithm>
#include <vector>

#include "convert.h"
#include "lif_rows.h"
#include "stream.h"
#include "switches.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {
namespace {

constexpr int64_t kParts = 64;

// Two sums a channel: float32 for some rows, one a place of a period; float64 for a part.
struct Sums {
  std::vector<float> few;
  double* all;  // [2, channels]
  int64_t channels, period, pending = 0;

  Sums(double* all, int64_t channels)
      : few(static_cast<size_t>(2 * period_of(channels))), all(all), channels(channels), period(period_of(channels)) {}
  ~Sums() { flush(); }
  float* at(int which, int64_t place) { return few.data() + which * period + place; }
  void added(int64_t values) {
    if ((pending += values) >= 64 * period) flush();
  }

 private:
  void flush() {
    if (pending == 0) return;
    for (int64_t first = 0; first < 2 * period; first += channels) {
      double* to = all + first / period * channels;
      for (int64_t i = 0; i < channels; ++i) to[i] += static_cast<double>(few[static_cast<size_t>(first + i)]);
    }
    std::fill(few.begin(), few.end(), 0.0f);
    pending = 0;
  }
};

// The sums of all parts, [2, channels].
std::vector<double> total(const std::vector<double>& parts, int64_t channels) {
  const size_t each = static_cast<size_t>(2 * channels);
  std::vector<double> sums(each);
  for (size_t part = 0; part < parts.size(); part += each)
    for (size_t i = 0; i < each; ++i) sums[i] += parts[part + i];
  return sums;
}

template <Surrogate kind, bool soft_reset, bool detach_reset>
void backward(const BnLifBackward& c) {
  const LifParams& p = c.params;
  const Recompute recompute = recompute_for<true>(p);
  const int64_t n = c.rows * c.channels, period = period_of(c.channels);
  const int64_t most = backward_block(c.steps), block = period > most ? most : most / period * period;
  const int64_t parts = std::min(kParts, c.rows);
  const bool summed = c.sums != nullptr, writes = c.dx != nullptr, learns = c.factors != nullptr;
  const bool stream = writes && may_stream(c.dx, c.x_dtype, c.steps * c.rows, c.channels);
  std::vector<double> sums(summed ? static_cast<size_t>(parts * 2 * c.channels) : 0);
  const std::vector<float> all_scale = repeated(c.scale, c.channels), all_shift = repeated(c.shift, c.channels);
  const std::vector<float> all_mean = repeated(c.mean, c.channels);
  std::vector<float> all_factors[3];
  for (int i = 0; learns && i < 3; ++i) all_factors[i] = repeated(c.factors + i * c.channels, c.channels);
#pragma omp parallel num_threads(team(c.threads, c.steps * n))
  {
    const auto h = scratch(c.steps * block), v = scratch(block), dv = scratch(block);
    alignas(64) float x_buffer[kMaxBlock], ds_buffer[kMaxBlock], dx_buffer[kMaxBlock];
#pragma omp for schedule(static)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = part * c.rows / parts * c.channels, end = (part + 1) * c.rows / parts * c.channels;
      Sums mine(summed ? sums.data() + part * 2 * c.channels : nullptr, c.channels);
      for (int64_t first = begin, width; first < end; first += width) {
        const int64_t from = (first - begin) % period;
        width = std::min({block, end - first, period > block ? period - from : block});
        const int64_t ahead = std::min(width, n - first - width);
        start(nullptr, p, first, width, v.get());
        for (int64_t t = 0; t < c.steps; ++t) {
          const float* x = load_row(c.x, c.x_dtype, t * n + first, width, x_buffer);
          float* h_now = h.get() + t * block;
          each_chunk(period, from, width, [&](int64_t i, int64_t place, int64_t count) {
            recompute(x + i, &all_scale[place], &all_shift[place], v.get() + i, h_now + i, v.get() + i, count, p);
          });
        }
        std::fill(dv.get(), dv.get() + width, 0.0f);
        for (int64_t t = c.steps - 1; t >= 0; --t) {
          const int64_t at = t * n + first;
          const float* all_ds = load_row(c.ds, c.ds_dtype, at, width, ds_buffer);
          const float* all_x = load_row(c.x, c.x_dtype, at, width, x_buffer);
          float* all_dx = writes ? row_to_write(c.dx, c.x_dtype, at, dx_buffer) : nullptr;
          each_chunk(period, from, width, [&](int64_t i, int64_t place, int64_t count) {
            prefetch_row(c.x, c.x_dtype, at + width + i, std::min(count, ahead - i));
            prefetch_row(c.ds, c.ds_dtype, at + width + i, std::min(count, ahead - i));
            const auto step = [&](auto use) {
              backward_step<kind, soft_reset, detach_reset>(h.get() + t * block + i, all_ds + i, dv.get() + i, count, p, use);
            };
            alignas(kLine) float lines[kChunk];
            float *plain = mine.at(0, place), *centred = mine.at(1, place), *dx = stream ? lines : all_dx + i;
            const float *x = all_x + i, *mean = &all_mean[place];
            const auto sum = [=](int64_t j, float dz) {
              plain[j] += dz;
              centred[j] += dz * (x[j] - mean[j]);
            };
            const auto both = [&](auto write) {
              if (!summed) return step(write);
              step([=](int64_t j, float dz) {
                sum(j, dz);
                write(j, dz);
              });
            };
            if (!writes) return step(sum);
            if (learns) {
              const float *a = &all_factors[0][place], *b = &all_factors[1][place], *constant = &all_factors[2][place];
              both([=](int64_t j, float dz) { dx[j] = a[j] * dz + (b[j] * x[j] + constant[j]); });
            } else {
              both([=](int64_t j, float dz) { dx[j] = dz; });
            }
            if (stream) stream_lines(all_dx + i, lines, count);
          });
          if (writes) store_row(c.dx, c.x_dtype, at, width, all_dx);
        }
        if (summed) mine.added(width * c.steps);
      }
    }
  }
  if (!summed) return;
  const std::vector<double> all = total(sums, c.channels);
  std::copy(all.begin(), all.end(), c.sums);
}

}  // namespace

// Sums of x and of its square are taken about the first row, which keeps them small beside a large mean.
void bn_stats(const BnStats& c) {
  constexpr int64_t kRows = 4;  // whose sums are added up before they are kept
  const int64_t parts = std::min(kParts, c.rows), period = period_of(c.channels);
  std::vector<double> sums(static_cast<size_t>(parts * 2 * c.channels));
  std::vector<float> buffer(static_cast<size_t>(c.channels));
  const std::vector<float> all_first = repeated(load_row(c.x, c.x_dtype, 0, c.channels, buffer.data()), c.channels);
#pragma omp parallel num_threads(team(c.threads, c.rows * c.channels))
  {
    std::vector<float> row_buffer(static_cast<size_t>(kRows * period));
#pragma omp for schedule(static)
    for (int64_t part = 0; part < parts; ++part) {
      Sums mine(sums.data() + part * 2 * c.channels, c.channels);
      const int64_t end = (part + 1) * c.rows / parts * c.channels;
      for (int64_t at = part * c.rows / parts * c.channels, width; at < end; at += width) {
        width = end - at >= kRows * period ? kRows * period : std::min(period, end - at);
        const float* rows = load_row(c.x, c.x_dtype, at, width, row_buffer.data());
        each_chunk(period, 0, std::min(width, period), [&](int64_t i, int64_t, int64_t count) {
          const float *x = rows + i, *first = &all_first[i];
          float *plain = mine.at(0, i), *square = mine.at(1, i);
          if (width <= period) {
#pragma omp simd
            for (int64_t j = 0; j < count; ++j) {
              const float d = x[j] - first[j];
              plain[j] += d;
              square[j] += d * d;
            }
            return;
          }
          for (int64_t row = 0; row < kRows; ++row) {
            const int64_t next = at + width + row * period + i;
            prefetch_row(c.x, c.x_dtype, next, std::min(count, end - next));
          }
#pragma omp simd
          for (int64_t j = 0; j < count; ++j) {
            const float d0 = x[j] - first[j], d1 = x[j + period] - first[j];
            const float d2 = x[j + 2 * period] - first[j], d3 = x[j + 3 * period] - first[j];
            plain[j] += (d0 + d1) + (d2 + d3);
            square[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
          }
        });
        mine.added(width);
      }
    }
  }
  const std::vector<double> all = total(sums, c.channels);
  for (int64_t i = 0; i < c.channels; ++i) {
    const double count = static_cast<double>(c.rows), mean = all[i] / count;
    c.mean[i] = static_cast<float>(static_cast<double>(all_first[i]) + mean);
    c.var[i] = static_cast<float>(std::max(0.0, all[c.channels + i] / count - mean * mean));
  }
}

void bn_lif_backward(const BnLifBackward& c) {
  by_surrogate(c.surrogate, [&](auto kind) {
    by_flags(c.params.soft_reset, c.params.detach_reset, [&](auto soft_reset, auto detach_reset) {
      backward<decltype(kind)::value, decltype(soft_reset)::value, decltype(detach_reset)::value>(c);
    });
  });
}

void bn_dx(const BnDx& c) {
  const int64_t n = c.rows * c.channels, period = period_of(c.channels);
  const int64_t block = std::max<int64_t>(period, kMaxBlock / period * period);
  std::vector<float> all_factors[3];
  for (int i = 0; i < 3; ++i) all_factors[i] = repeated(c.factors + i * c.channels, c.channels);
#pragma omp parallel num_threads(team(c.threads, n))
  {
    std::vector<float> dz_buffer(static_cast<size_t>(block)), x_buffer(static_cast<size_t>(block));
#pragma omp for schedule(static)
    for (int64_t first = 0; first < n; first += block) {
      const int64_t width = std::min(block, n - first);
      float* all_dz = row_to_write(c.dz, c.dtype, first, dz_buffer.data());
      load_row(c.dz, c.dtype, first, width, dz_buffer.data());
      const float* all_x = load_row(c.x, c.dtype, first, width, x_buffer.data());
      each_chunk(period, 0, width, [&](int64_t i, int64_t place, int64_t count) {
        const float *a = &all_factors[0][place], *b = &all_factors[1][place], *constant = &all_factors[2][place], *x = all_x + i;
        float* dz = all_dz + i;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) dz[j] = a[j] * dz[j] + (b[j] * x[j] + constant[j]);
      });
      store_row(c.dz, c.dtype, first, width, all_dz);
    }
  }
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
