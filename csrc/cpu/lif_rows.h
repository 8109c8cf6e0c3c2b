// One time-step over a row of neurons, as loops that are left to the vectoriser, and the scratch they run in.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <memory>
#include <new>

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

// Rows of one block lie a whole time-step apart, too far for the hardware to see the next block coming. Into the second-level
// cache: the first is full, and its few pending misses would hold up the loop.
inline void prefetch_row(const void* base, Dtype dtype, int64_t offset, int64_t width) {
  if (base == nullptr) return;
  const int64_t size = dtype == Dtype::f32 ? 4 : 2;
  const char* row = static_cast<const char*>(base) + offset * size;
  for (int64_t i = 0; i < width * size; i += 64) __builtin_prefetch(row + i, 0, 2);
}

inline int team(int threads, int64_t elements) { return elements < kSerialBelow ? 1 : threads; }

inline void start(const float* v0, const LifParams& p, int64_t first, int64_t width, float* v) {
  if (v0 != nullptr)
    std::copy(v0 + first, v0 + first + width, v);
  else
    std::fill(v, v + width, p.v_reset);
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

template <bool decay_input, bool soft_reset>
void recompute_step(const float* x, const float* v, float* h, float* v_next, int64_t width, const LifParams& params) {
  LifParams p = params;
  p.decay_input = decay_input;
  p.soft_reset = soft_reset;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    h[i] = lif_charge(v[i], x[i], p);
    v_next[i] = lif_reset(h[i], p);
  }
}

using Recompute = void (*)(const float*, const float*, float*, float*, int64_t, const LifParams&);

inline Recompute recompute_for(const LifParams& p) {
  if (p.decay_input) return p.soft_reset ? recompute_step<true, true> : recompute_step<true, false>;
  return p.soft_reset ? recompute_step<false, true> : recompute_step<false, false>;
}

template <Surrogate kind, bool soft_reset, bool detach_reset>
void backward_step(const float* h, const float* ds, float* dv, float* dx, int64_t width, const LifParams& params) {
  LifParams p = params;
  p.soft_reset = soft_reset;
  p.detach_reset = detach_reset;
  const float to_x = p.decay_input ? 1.0f / p.tau : 1.0f;
  const float to_v = 1.0f - 1.0f / p.tau;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float dh = lif_step_grad<kind>(h[i], ds[i], dv[i], p);
    dx[i] = dh * to_x;
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
