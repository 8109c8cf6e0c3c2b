// Convolutions of packed spikes on the CPU, event-driven; all images are channels-last.
#pragma once

#include "isas.h"
#include "spike_matmul.h"

namespace spikeclip {

struct Conv2d {
  int64_t batch, height, width;          // of the spikes
  int64_t out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t pad_height, pad_width;
};

struct SpikeConv2d {
  Conv2d shape;
  const uint32_t* words;  // [batch, height, width, words_per_row(channels)]
  int64_t channels;
  Tiles tiles;  // of weights [kernel_height * kernel_width * channels, columns]
  const void* weights;
  const float* scale;
  const float* bias;
  void* out;  // [batch, out_height, out_width, columns]
  Dtype out_dtype;
  int threads;
};

struct SpikeConv2dGrad {
  Conv2d shape;
  const uint32_t* words;
  int64_t channels, columns;
  const void* dy;  // [batch, out_height, out_width, columns]
  Dtype dy_dtype;
  float* dw;  // [kernel_height, kernel_width, channels, columns]
  int threads;
};

SPIKECLIP_FOR_EVERY_ISA(
    void spike_conv2d(const SpikeConv2d& call);
    void spike_conv2d_grad(const SpikeConv2dGrad& call);)

}  // namespace spikeclip
