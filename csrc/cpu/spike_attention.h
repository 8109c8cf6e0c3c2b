// Softmax-free attention on packed spikes on the CPU: q (k^T v) * scale per head, heads side by side in a token's bits.
#pragma once

#include <stdint.h>

#include "../lif_step.h"
#include "isas.h"

namespace spikeclip {

struct SpikeAttention {
  const uint32_t* q;  // [images, q_tokens, words_per_row(row)]
  const uint32_t* k;  // [images, k_tokens, words_per_row(row)]
  const uint32_t* v;
  int64_t images, q_tokens, k_tokens, channels, heads;
  bool together;  // q, k and v are side by side in the same rows, of 3 channels spikes, and so are their gradients
  float scale;
  void* out;  // [images, q_tokens, channels]
  Dtype dtype;
  int threads;
};

struct SpikeAttentionGrad {
  SpikeAttention forward;  // its `out` is the gradient dy
  void* dq;                // the first of [images, q_tokens, row], dtype as dy
  void* dk;                // of [images, k_tokens, row]
  void* dv;
};

// Attention and the neurons behind it, for heads whose width is 16, 32, 48 or 64.
struct SpikeAttentionLif {
  SpikeAttention forward;  // images: of all steps, [steps, batch]; out: not used
  int64_t steps;
  uint32_t* words;  // [images, q tokens, words_per_row(channels)]
  LifParams params;
};

SPIKECLIP_FOR_EVERY_ISA(
    void spike_attention(const SpikeAttention& call);
    void spike_attention_grad(const SpikeAttentionGrad& call);
    void spike_attention_lif(const SpikeAttentionLif& call);)

}  // namespace spikeclip
