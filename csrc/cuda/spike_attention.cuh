// Softmax-free attention on packed spikes on CUDA. A head is `width` bits of a packed row, from bit head * width.
#pragma once

#include <stdint.h>

#include "../lif_step.h"

namespace spikeclip {

struct Heads {
  int64_t sequences;
  int heads, width;
};

// y [sequences, n, heads * width] = (q k^T) v * scale.
struct SpikeAttention {
  Heads size;
  int n, s;
  const uint32_t *q, *k, *v;  // [sequences, n or s, ceil(heads * width / 32)]
  void* y;
  Dtype y_dtype;
  float scale;
};

// gram [sequences, heads, width, width] = a^T b, float32.
struct HeadGram {
  Heads size;
  int rows;
  const uint32_t* a;
  const void* b;  // packed, or dense [sequences, rows, heads * width]
  bool b_packed;
  Dtype b_dtype;
  float* gram;
};

// y [sequences, rows, heads * width] = a gram * scale, or a gram^T * scale.
struct HeadApply {
  Heads size;
  int rows;
  const void* a;
  bool a_packed;
  Dtype a_dtype;
  const float* gram;
  bool transposed;
  void* y;
  Dtype y_dtype;
  float scale;
};

void spike_attention(const SpikeAttention& call, void* stream);
void head_gram(const HeadGram& call, void* stream);
void head_apply(const HeadApply& call, void* stream);

}  // namespace spikeclip
