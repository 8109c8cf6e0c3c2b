// One time-step over a row of neurons, as loops that are left to the vectoriser, and the scratch they run in.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "lif.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {

constexpr int64_t kMaxBlock = 1024;
constexpr int64_t kSerialBelow = 32768;  // elements; starting threads costs more than the work

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};

inline std::unique_ptr<float[], AlignedDelete> scratch(int64_t count) {
  return std::unique_ptr<float[], AlignedDelete>(
      static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t(64))));
}

// Neurons whose membranes over all steps the backward pass keeps: 8 KiB, so that x, ds and dx fit beside them in the first-level
// cache.
inline int64_t backward_block(int64_t steps) {
  return std::clamp<int64_t>(2048 / steps / kMinBlock * kMinBlock, kMinBlock, kMaxBlock);
}

inline int team(int threads, int64_t elements) { return elements < kSerialBelow ? 1 : threads; }

inline void start(const float* v0, const LifParams& p, int64_t first, int64_t width, float* v) {
  if (v0 != nullptr)
    std::copy(v0 + first, v0 + first + width, v);
  else
    std::fill(v, v + width, p.v_reset);
}

// Neurons that go through one loop, while what is read next of the neighbouring block is fetched.
constexpr int64_t kChunk = 128;

// Rows of few channels are taken several at once, so that loops over them are not short.
inline int64_t period_of(int64_t channels) { return channels * std::max<int64_t>(1, 2 * kChunk / channels); }

// A value a channel, over and over for a whole period.
inline std::vector<float> repeated(const float* values, int64_t channels) {
  std::vector<float> all(static_cast<size_t>(period_of(channels)));
  for (size_t i = 0; i < all.size(); i += static_cast<size_t>(channels)) std::copy(values, values + channels, all.data() + i);
  return all;
}

// f(first, place, count) for the chunks of a block of `width` values, each inside one period; the block's first value is the
// period's value `place`.
template <typename F>
void each_chunk(int64_t period, int64_t place, int64_t width, F f) {
  for (int64_t first = 0, count; first < width; first += count) {
    count = std::min({kChunk, period - place, width - first});
    f(first, place, count);
    place = place + count == period ? 0 : place + count;
  }
}

template <bool decay_input, bool soft_reset, typename Spike>
void forward_step(const float* x, float* v, Spike* spikes, Spike one, int64_t width, const LifParams& params) {
  LifParams p = params;
  p.decay_input = decay_input;
  p.soft_reset = soft_reset;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float h = lif_charge(v[i], x[i], p);
    spikes[i] = h >= p.v_threshold ? one : Spike(0);
    v[i] = lif_reset(h, p);
  }
}

// Charge from x, or from x * scale + shift, and reset; keeps the membranes between the two.
template <bool decay_input, bool soft_reset, bool scaled>
void recompute_step(const float* x, const float* scale, const float* shift, const float* v, float* h, float* v_next, int64_t width,
                    const LifParams& params) {
  LifParams p = params;
  p.decay_input = decay_input;
  p.soft_reset = soft_reset;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    h[i] = lif_charge(v[i], scaled ? x[i] * scale[i] + shift[i] : x[i], p);
    v_next[i] = lif_reset(h[i], p);
  }
}

using Recompute = void (*)(const float*, const float*, const float*, const float*, float*, float*, int64_t, const LifParams&);

template <bool scaled>
Recompute recompute_for(const LifParams& p) {
  if (p.decay_input) return p.soft_reset ? recompute_step<true, true, scaled> : recompute_step<true, false, scaled>;
  return p.soft_reset ? recompute_step<false, true, scaled> : recompute_step<false, false, scaled>;
}

// `use(i, dx)` takes the gradient of neuron i's current; at most kChunk neurons. Exponentials have a loop of their own: with all
// the rest an iteration is a chain of operations so long that few of them are under way at once.
template <Surrogate kind, bool soft_reset, bool detach_reset, typename Use>
void backward_step(const float* h, const float* ds, float* dv, int64_t width, const LifParams& params, Use use) {
  LifParams p = params;
  p.soft_reset = soft_reset;
  p.detach_reset = detach_reset;
  const float to_x = p.decay_input ? 1.0f / p.tau : 1.0f;
  const float to_v = 1.0f - 1.0f / p.tau;
  constexpr bool apart = has_exponential(kind);
  alignas(64) float exponentials[kChunk];
  if (apart)
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) exponentials[i] = surrogate_exponential<kind>(h[i] - p.v_threshold, p.alpha);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float e = apart ? exponentials[i] : h[i] - p.v_threshold;
    const float dh = lif_step_grad(surrogate_slope<kind>(e, p.alpha), h[i], ds[i], dv[i], p);
    use(i, dh * to_x);
    dv[i] = dh * to_v;
  }
}

// Currents of whole rows of channels, or of a part of one: x * scale + shift.
inline const float* scaled_rows(const float* x, const float* scale, const float* shift, int64_t channels, int64_t width,
                                float* out) {
  for (int64_t first = 0; first < width; first += channels) {
    const int64_t count = std::min(channels, width - first);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[first + i] = x[first + i] * scale[i] + shift[i];
  }
  return out;
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
