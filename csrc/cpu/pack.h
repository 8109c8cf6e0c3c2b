// Spikes at one bit each: row r of [rows, length] becomes words_per_row(length) little-endian 32-bit words, padded with 0.
#pragma once

#include <stdint.h>

#include "../lif_step.h"
#include "isas.h"

namespace spikeclip {

inline int64_t words_per_row(int64_t length) { return (length + 31) / 32; }

struct Pack {
  const void* spikes;
  Dtype dtype;
  uint32_t* words;
  int64_t rows, length;
  int threads;
};

SPIKECLIP_FOR_EVERY_ISA(
    bool pack(const Pack& call); // false: a value is neither 0 nor 1
    void unpack(const Pack& call);
    int64_t count(const uint32_t* words, int64_t number);)

}  // namespace spikeclip
