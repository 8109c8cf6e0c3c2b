// Dense rows times weights on the CPU, multiplied and summed in float32.
#pragma once

#include <stdint.h>

#include "../lif_step.h"
#include "isas.h"

namespace spikeclip {

struct DenseProduct {
  int64_t rows, depth, columns;
  const void* x;  // [rows, depth]
  Dtype x_dtype;
  const float* w;  // [depth, columns]
  void* out;       // [rows, columns]
  Dtype out_dtype;
  int threads;
};

SPIKECLIP_FOR_EVERY_ISA(void dense_product(const DenseProduct& call);)

}  // namespace spikeclip
