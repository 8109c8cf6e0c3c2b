// Softmax-free attention on packed spikes on CUDA. A head is `width` bits of a packed row, from bit head * width of the q, k or v
// that are in the row.
#pragma once

#include <stdint.h>

#include "../lif_step.h"

namespace spikeclip {

struct Heads {
  int64_t sequences;
  int heads, width;
};

// Rows of packed spikes, `per_row` words each, whose own are those from bit `first` on.
struct Spikes {
  const uint32_t* words;
  int per_row, first;
};

// y [sequences, n, heads * width] = (q k^T) v * scale.
struct SpikeAttention {
  Heads size;
  int n, s;
  Spikes q, k, v;  // [sequences, n or s]
  void* y;
  Dtype y_dtype;
  float scale;
};

// gram [sequences, heads, width, width] = a^T b, float32.
struct HeadGram {
  Heads size;
  int rows;
  Spikes a, b;
  const void* dense;  // b as [sequences, rows, heads * width], or null
  Dtype dense_dtype;
  float* gram;
};

// y [sequences, rows, heads * width], rows `y_row` apart, = a gram * scale, or a gram^T * scale.
struct HeadApply {
  Heads size;
  int rows;
  Spikes a;
  const void* dense;  // a as [sequences, rows, heads * width], or null
  Dtype dense_dtype;
  const float* gram;
  bool transposed;
  void* y;
  int y_row;
  Dtype y_dtype;
  float scale;
};

void spike_attention(const SpikeAttention& call, void* stream);
void head_gram(const HeadGram& call, void* stream);
void head_apply(const HeadApply& call, void* stream);

}  // namespace spikeclip
