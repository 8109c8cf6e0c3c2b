// BatchNorm before LIF on CUDA: x, spikes, ds, dx are dense [steps, rows, channels], the current x * scale + shift by channel.
#pragma once

#include <stdint.h>

#include "../lif_step.h"

namespace spikeclip {

struct BnStats {
  const void* x;  // dense [rows, channels]
  Dtype x_dtype;
  float* sums;  // [parts, 2, channels], of x - first row and of its square
  int64_t rows, channels, parts;
};

struct BnLifForward {
  const void* x;
  Dtype x_dtype;
  const float* v0;     // null: start at v_reset
  const float* scale;  // null, with shift: the current is x
  const float* shift;
  void* spikes;
  bool packed;  // spikes are uint32_t [steps, rows, ceil(channels / 32)]
  Dtype spike_dtype;  // x's, or any for float32 x
  float* v_last;
  int64_t steps, rows, channels;
  const float* tau;  // device pointer; null: params.tau
  LifParams params;
};

struct BnLifBackward {
  const void* ds;
  Dtype ds_dtype;  // x's, or any for float32 x
  const void* x;
  Dtype x_dtype;
  const float* scale;
  const float* shift;
  const float* mean;
  const float* factors;  // [3, channels] a, b, c of dx = a dz + b x + c, where dz is the current's gradient; null: no dx
  void* dx;
  float* sums;  // [parts, 2, channels], of dz and of dz (x - mean); null: not wanted
  int64_t steps, rows, channels, parts;  // at most 8 steps
  LifParams params;
  Surrogate surrogate;
};

// Into how many parts, with sums of their own, rows are split.
int64_t bn_parts(int64_t rows, int64_t channels);
// stream is a cudaStream_t; a launch that fails throws std::runtime_error.
void bn_stats(const BnStats& call, void* stream);
void bn_lif_forward(const BnLifForward& call, void* stream);
void bn_lif_backward(const BnLifBackward& call, void* stream);

}  // namespace spikeclip
