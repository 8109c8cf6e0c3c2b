// BatchNorm before LIF on the CPU: x, ds, dx are dense [steps, rows, channels]; the current is x * scale + shift by channel.
#pragma once

#include <stdint.h>

#include "../lif_step.h"
#include "isas.h"

namespace spikeclip {

struct BnStats {
  const void* x;
  Dtype x_dtype;
  int64_t rows, channels;
  float* mean;  // [channels]
  float* var;   // [channels], of the rows themselves (divided by their number)
  int threads;
};

struct BnLifBackward {
  const void* ds;
  Dtype ds_dtype;
  const void* x;
  Dtype x_dtype;
  const float* scale;
  const float* shift;
  const float* mean;
  const float* factors;  // [3, channels] a, b, c of dx = a dz + b x + c, where dz is the current's gradient; null: dz itself
  void* dx;              // null: not wanted
  float* sums;           // [2, channels], the sums of dz and of dz (x - mean); null: not wanted
  int64_t steps, rows, channels;
  LifParams params;
  Surrogate surrogate;
  int threads;
};

// dz becomes dx.
struct BnDx {
  void* dz;
  const void* x;
  Dtype dtype;           // of both
  const float* factors;  // [3, channels]
  int64_t rows, channels;
  int threads;
};

SPIKECLIP_FOR_EVERY_ISA(
    void bn_stats(const BnStats& call);
    void bn_lif_backward(const BnLifBackward& call);
    void bn_dx(const BnDx& call);)

}  // namespace spikeclip
