// Products of packed spikes with weights on CUDA. A matrix product is the 1x1 convolution of m images of one pixel.
#pragma once

#include <stdint.h>

#include "../lif_step.h"

namespace spikeclip {

enum class WeightDtype : int { f32 = 0, f16 = 1, bf16 = 2, i16 = 3, i8 = 4 };

struct ConvShape {
  int height, width, out_height, out_width, kernel_width, stride_h, stride_w, pad_h, pad_w, taps;
};

struct SpikeProduct {
  const uint32_t* words;  // [images, height, width, ceil(channels / 32)]
  ConvShape shape;
  int m, n, channels;  // output pixels, output columns
  const void* w;       // by its strides of tap, channel and column
  WeightDtype w_dtype;
  int64_t stride_tap, stride_k, stride_n;
  const float* scale;  // null: 1; else [n]
  const float* bias;   // null: 0; else [n]
  void* y;             // dense [m, n]
  Dtype y_dtype;
};

struct SpikeGradient {
  const uint32_t* words;
  ConvShape shape;
  int m, n, channels;
  const void* dy;  // by its strides of image, line, pixel and column
  Dtype dy_dtype;
  int64_t stride_image, stride_line, stride_pixel, stride_n;
  float* dw;  // dense [splits, taps, channels, n], a partial sum of each split
  int splits;
};

// Into how many parts the m rows of a gradient are split; the caller adds them.
int gradient_splits(int64_t m, int64_t n, int64_t channels, int64_t taps);
void spike_product(const SpikeProduct& call, void* stream);
void spike_gradient(const SpikeGradient& call, void* stream);

}  // namespace spikeclip
