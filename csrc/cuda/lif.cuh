// Multi-timestep LIF on CUDA: x, spikes, ds, dx are dense [T, n] blocks; v0, v_last, dv_last, dv0 are float32 [n].
#pragma once

#include <stdint.h>

#include "../lif_step.h"

namespace spikeclip {

struct LifForward {
  const void* x;
  Dtype x_dtype;
  const float* v0;  // null: start at v_reset
  void* spikes;
  Dtype spike_dtype;  // x's, or any for float32 x
  float* v_last;
  int64_t steps, n;
  const float* tau;  // device pointer; null: params.tau
  LifParams params;
};

struct LifBackward {
  const void* ds;  // null: zero
  Dtype ds_dtype;  // x's, or any for float32 x
  const float* dv_last;  // null: zero
  const void* x;
  Dtype x_dtype;
  const float* v0;
  void* dx;
  float* dv0;    // null: not wanted
  double* dtau;  // null: not wanted; else tau_partials(n) partial sums, one per thread block
  int64_t steps, n;
  const float* tau;
  LifParams params;
  Surrogate surrogate;
};

int64_t tau_partials(int64_t n);
// stream is a cudaStream_t; a launch that fails throws std::runtime_error.
void lif_forward(const LifForward& call, void* stream);
void lif_backward(const LifBackward& call, void* stream);

}  // namespace spikeclip
