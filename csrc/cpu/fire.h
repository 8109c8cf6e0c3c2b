// Neurons as the epilogue of a product: one step of a row of currents, spikes as bits.
#pragma once

#include "../lif_step.h"
#include "switches.h"
#include "words.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {

// `count` is a multiple of 16, at most 64; v is updated, bit i of the result is neuron i's spike.
template <int count, bool decay_input, bool soft_reset>
SPIKECLIP_HD uint64_t fire_row(const float* current, float* v, LifParams p) {
  p.decay_input = decay_input;
  p.soft_reset = soft_reset;
  alignas(64) float h[count];
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    h[i] = lif_charge(v[i], current[i], p);
    v[i] = lif_reset(h[i], p);
  }
  uint64_t bits = 0;
  for (int i = 0; i < count; i += 16) bits |= static_cast<uint64_t>(reached(h + i, p.v_threshold)) << i;
  return bits;
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
