// A product or convolution of packed spikes, the max-pool and the neurons behind it, all time-steps in one: spikes to spikes.
#pragma once

#include <stdint.h>

#include "../lif_step.h"
#include "isas.h"
#include "spike_conv2d.h"

namespace spikeclip {

struct SpikeLif {
  int64_t steps;
  // Of one step: batch images for a convolution; for a product, batch rows of `channels` spikes and everything else 1 or 0.
  Conv2d shape;
  bool convolution;
  const uint32_t* words;  // [steps, batch, height, width, words_per_row(channels)]
  int64_t channels;
  Tiles tiles;
  const void* weights;
  const float* scale;
  const float* bias;
  int64_t pool_size, pool_stride, pool_padding;  // size 0: none; else neither `add` nor `currents`
  int64_t pooled_height, pooled_width;           // the convolution's own without a pool
  const float* add;      // [steps, batch, out height, out width, columns], added to the currents, or null
  float* currents;       // where they are kept, may be `add`, or null
  uint32_t* out;         // [steps, batch, pooled height, pooled width, words_per_row(columns)]
  LifParams params;
  int threads;
};

SPIKECLIP_FOR_EVERY_ISA(void spike_lif(const SpikeLif& call);)

}  // namespace spikeclip
