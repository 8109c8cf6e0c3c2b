// Multi-timestep LIF on the CPU: x, spikes, ds, dx are dense [T, n] blocks; v0, v_last, dv_last, dv0 are float32 [n].
// Packed spikes and norms see the n neurons as rows of `channels`.
#pragma once

#include <stdint.h>

#include "../lif_step.h"
#include "isas.h"

namespace spikeclip {

struct LifForward {
  const void* x;
  Dtype x_dtype;
  const float* v0;  // null: start at v_reset
  void* spikes;
  Dtype spike_dtype;
  float* v_last;
  int64_t steps, n;
  LifParams params;
  int threads;
  bool packed;          // spikes are words, words_per_row(channels) a row
  int64_t channels;     // 0: neither packed nor scaled
  bool repeated;        // x is [n], the same at every step
  const float* scale;   // [channels], null: the current is x itself; else x * scale + shift
  const float* shift;
};

struct LifBackward {
  const void* ds;  // null: zero
  Dtype ds_dtype;
  const float* dv_last;  // null: zero
  const void* x;
  Dtype x_dtype;
  const float* v0;
  void* dx;
  float* dv0;     // null: not wanted
  double* dtau;   // null: not wanted; else one partial sum per block of neurons, at most tau_partials(n)
  int64_t steps, n;
  LifParams params;
  Surrogate surrogate;
  int threads;
};

// Blocks are never narrower than this, which bounds the number of partial sums of dtau.
constexpr int64_t kMinBlock = 64;

inline int64_t tau_partials(int64_t n) { return (n + kMinBlock - 1) / kMinBlock; }

SPIKECLIP_FOR_EVERY_ISA(
    void lif_forward(const LifForward& call);
    void lif_backward(const LifBackward& call);)

}  // namespace spikeclip
