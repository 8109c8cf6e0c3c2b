// Compiled once per instruction set, with SPIKECLIP_ISA naming it; loops over neurons are left to the vectoriser.
//
// A thread walks blocks of neurons narrow enough for one block's state over all T steps to stay in cache. The backward
// pass recomputes the membrane h of its block from x, so that h never reaches memory: x and ds are read once, dx is
// written once.
#include "lif.h"

#include <algorithm>

#include "convert.h"
#include "lif_rows.h"
#include "pack.h"
#include "stream.h"
#include "switches.h"
#include "words.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {
namespace {

// Sum of dx * d(h)/d(tau) over the row; `v` is the membrane before the charge.
template <bool decay_input>
double tau_step(const float* v, const float* x, const float* dx, int64_t width, const LifParams& params) {
  LifParams p = params;
  p.decay_input = decay_input;
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += static_cast<double>(dx[i] * lif_charge_grad_tau(v[i], x[i], p));
  return sum;
}

// Spikes of whole rows of channels, or of one row from `column` on, to words.
void pack_rows(const float* spikes, int64_t at, int64_t width, int64_t channels, uint32_t* words) {
  Strange strange;
  const int64_t per_row = words_per_row(channels);
  for (int64_t first = 0; first < width; first += channels) {
    const int64_t here = at + first, count = std::min(channels, width - first);
    uint32_t* to = words + here / channels * per_row + here % channels / 32;
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) *to++ = word_of(spikes + first + i, &strange);
    if (i == count) continue;
    float tail[32] = {};
    std::copy(spikes + first + i, spikes + first + count, tail);
    *to = word_of(tail, &strange);
  }
}

template <bool decay_input, bool soft_reset, typename Spike>
void forward(const LifForward& c, Spike one) {
  // Blocks are whole rows, or one of the equal parts of a row, all but the last of whole words.
  const int64_t row = c.channels == 0 ? c.n : c.channels;
  const int64_t parts = c.channels == 0 ? (c.n + kMaxBlock - 1) / kMaxBlock : (row + kMaxBlock - 1) / kMaxBlock;
  const int64_t rows_each = parts == 1 ? std::max<int64_t>(1, kMaxBlock / row) : 1;
  const int64_t rows = c.n / row, blocks = (rows + rows_each - 1) / rows_each * parts;
#pragma omp parallel for schedule(static) num_threads(team(c.threads, c.steps * c.n))
  for (int64_t b = 0; b < blocks; ++b) {
    alignas(64) float x_buffer[kMaxBlock], current[kMaxBlock], spikes[kMaxBlock];
    const int64_t column = b % parts * kMaxBlock, first = b / parts * rows_each * row + column;
    const int64_t width = parts == 1 ? std::min(rows_each * row, c.n - first) : std::min(kMaxBlock, row - column);
    float* v = c.v_last + first;
    start(c.v0, c.params, first, width, v);
    for (int64_t t = 0; t < c.steps; ++t) {
      const int64_t at = t * c.n + first;
      const float* x = load_row(c.x, c.x_dtype, c.repeated ? first : at, width, x_buffer);
      if (c.scale != nullptr) x = scaled_rows(x, c.scale + column, c.shift + column, row, width, current);
      if (c.packed) {
        forward_step<decay_input, soft_reset>(x, v, spikes, 1.0f, width, c.params);
        pack_rows(spikes, at, width, row, static_cast<uint32_t*>(c.spikes));
      } else {
        forward_step<decay_input, soft_reset>(x, v, static_cast<Spike*>(c.spikes) + at, one, width, c.params);
      }
    }
  }
}

template <Surrogate kind, bool soft_reset, bool detach_reset>
void backward(const LifBackward& c) {
  const LifParams& p = c.params;
  const Recompute recompute = recompute_for<false>(p);
  const int64_t block = backward_block(c.steps);
  const int64_t blocks = (c.n + block - 1) / block;
  const bool stream = c.dtau == nullptr && may_stream(c.dx, c.x_dtype, c.steps, c.n);
#pragma omp parallel num_threads(team(c.threads, c.steps * c.n))
  {
    const auto h = scratch(c.steps * block);
    // For dtau the membrane before each step is needed too; without it one row serves all steps.
    const auto v = scratch((c.dtau != nullptr ? c.steps + 1 : 1) * block);
    const int64_t v_stride = c.dtau != nullptr ? block : 0;
    alignas(64) float x_buffer[kMaxBlock], ds_buffer[kMaxBlock], dx_buffer[kMaxBlock], dv[kMaxBlock];
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = b * block, width = std::min(block, c.n - first), ahead = std::min(block, c.n - first - width);
      start(c.v0, p, first, width, v.get());
      for (int64_t t = 0; t < c.steps; ++t) {
        const float* x = load_row(c.x, c.x_dtype, t * c.n + first, width, x_buffer);
        recompute(x, nullptr, nullptr, v.get() + t * v_stride, h.get() + t * block, v.get() + (t + 1) * v_stride, width, p);
      }
      if (c.dv_last != nullptr)
        std::copy(c.dv_last + first, c.dv_last + first + width, dv);
      else
        std::fill(dv, dv + width, 0.0f);
      if (c.ds == nullptr) std::fill(ds_buffer, ds_buffer + width, 0.0f);
      double dtau = 0.0;
      for (int64_t t = c.steps - 1; t >= 0; --t) {
        const int64_t at = t * c.n + first;
        const float* ds = c.ds == nullptr ? ds_buffer : load_row(c.ds, c.ds_dtype, at, width, ds_buffer);
        float* dx = row_to_write(c.dx, c.x_dtype, at, dx_buffer);
        each_chunk(width, 0, width, [&](int64_t i, int64_t, int64_t count) {
          prefetch_row(c.x, c.x_dtype, at + width + i, std::min(count, ahead - i));
          prefetch_row(c.ds, c.ds_dtype, at + width + i, std::min(count, ahead - i));
          alignas(kLine) float lines[kChunk];
          backward_step<kind, soft_reset, detach_reset>(h.get() + t * block + i, ds + i, dv + i, count, p,
                                                        [to = stream ? lines : dx + i](int64_t j, float dx) { to[j] = dx; });
          if (stream) stream_lines(dx + i, lines, count);
        });
        if (c.dtau != nullptr) {
          const float* x = load_row(c.x, c.x_dtype, at, width, x_buffer);
          dtau += p.decay_input ? p.tau * tau_step<true>(v.get() + t * block, x, dx, width, p)
                                : tau_step<false>(v.get() + t * block, x, dx, width, p);
        }
        store_row(c.dx, c.x_dtype, at, width, dx);
      }
      if (c.dv0 != nullptr) std::copy(dv, dv + width, c.dv0 + first);
      if (c.dtau != nullptr) c.dtau[b] = dtau;
    }
  }
}

template <typename Spike>
void forward_as(const LifForward& c, Spike one) {
  by_flags(c.params.decay_input, c.params.soft_reset, [&](auto decay_input, auto soft_reset) {
    forward<decltype(decay_input)::value, decltype(soft_reset)::value>(c, one);
  });
}

}  // namespace

void lif_forward(const LifForward& c) {
  switch (c.spike_dtype) {
    case Dtype::f32: return forward_as<float>(c, 1.0f);
    case Dtype::f16: return forward_as<uint16_t>(c, 0x3C00);
    case Dtype::bf16: return forward_as<uint16_t>(c, 0x3F80);
  }
}

void lif_backward(const LifBackward& c) {
  by_surrogate(c.surrogate, [&](auto kind) {
    by_flags(c.params.soft_reset, c.params.detach_reset, [&](auto soft_reset, auto detach_reset) {
      backward<decltype(kind)::value, decltype(soft_reset)::value, decltype(detach_reset)::value>(c);
    });
  });
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
