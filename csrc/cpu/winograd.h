// The gradient of the image that a 3x3 convolution of stride 1 has read, on the CPU, in float32 from and to images of any dtype,
// all channels-last.
#pragma once

#include <stdint.h>

#include "../lif_step.h"
#include "isas.h"

namespace spikeclip {

struct WinogradGradient {
  int64_t batch, height, width, channels;  // of dx
  int64_t out_height, out_width, columns;  // of dy
  int64_t pad_height, pad_width;           // of the convolution, at most 2
  const void* dy;                          // [batch, out_height, out_width, columns]
  const float* w;                          // [columns, 3, 3, channels]
  void* dx;                                // [batch, height, width, channels]
  Dtype dtype;                             // of dy and dx
  int threads;
};

SPIKECLIP_FOR_EVERY_ISA(void winograd_gradient(const WinogradGradient& call);)

}  // namespace spikeclip
