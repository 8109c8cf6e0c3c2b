// Spikes to bits and back on CUDA: rows of `length` values, each ceil(length / 32) words.
#pragma once

#include <stdint.h>

namespace spikeclip {

enum class SpikeDtype : int { f32 = 0, f16 = 1, bf16 = 2, u8 = 3 };

struct PackCall {
  void* s;  // dense [rows, length]
  SpikeDtype dtype;
  uint32_t* words;  // dense [rows, ceil(length / 32)]
  int64_t rows, length;
  int32_t* flag;  // null: do not look; else set to 1 where a value is neither 0 nor 1
};

void pack(const PackCall& call, void* stream);
void unpack(const PackCall& call, void* stream);

}  // namespace spikeclip
