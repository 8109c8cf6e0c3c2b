// Max-pool of channels-last images [images, height, width, channels] between BatchNorm and LIF: what is largest behind the norm is
// the largest x where its scale is not negative, else the least.
#pragma once

#include <stdint.h>

#include "../lif_step.h"
#include "isas.h"

namespace spikeclip {

struct PoolShape {
  int64_t images, height, width, channels, out_height, out_width, size, stride, padding;
};

struct MaxPool {
  PoolShape shape;
  const void* x;
  Dtype dtype;          // of x, values, dvalues and dx
  const float* scale;   // [channels], its sign counts
  void* values;         // [images, out height, out width, channels]
  uint8_t* index;       // where in its window each value lies, row by row
  int threads;
};

struct MaxPoolGrad {
  PoolShape shape;
  const void* dvalues;
  const uint8_t* index;
  const void* x;
  Dtype dtype;
  const float* factors;  // [2, channels] b and c of dx = b x + c + the gradients of the values; null: both 0
  void* dx;
  int threads;
};

SPIKECLIP_FOR_EVERY_ISA(
    void max_pool(const MaxPool& call);
    void max_pool_grad(const MaxPoolGrad& call);)

}  // namespace spikeclip
