// Products of packed spikes with weights on the CPU, event-driven.
#pragma once

#include <stdint.h>

#include "../lif_step.h"

namespace spikeclip {

enum class WeightKind : int { f32 = 0, i16 = 1, i8 = 2 };

// Columns of a tile (one cache line of a row) and rows of a tile.
inline int64_t tile_columns(WeightKind kind) { return kind == WeightKind::f32 ? 16 : kind == WeightKind::i16 ? 32 : 64; }
inline int64_t tile_depth(WeightKind kind) { return kind == WeightKind::i8 ? 256 : 384; }

// Weights [length, columns] as tiles: per strip of tile_columns columns, per block of tile_depth rows, its rows' lines and a
// line of zeros.
struct Tiles {
  WeightKind kind;
  int64_t length, columns;

  int64_t blocks() const { return (length + tile_depth(kind) - 1) / tile_depth(kind); }
  int64_t strips() const { return (columns + tile_columns(kind) - 1) / tile_columns(kind); }
  int64_t block_length(int64_t block) const {
    const int64_t left = length - block * tile_depth(kind);
    return left < tile_depth(kind) ? left : tile_depth(kind);
  }
  int64_t bytes() const { return strips() * (length + blocks()) * 64; }
  int64_t offset(int64_t strip, int64_t block) const {
    return (strip * (length + blocks()) + block * (tile_depth(kind) + 1)) * 64;
  }
};

// Lay out weights as tiles. f32 tiles take f32, f16 or bf16 weights; i16 and i8 tiles take integers of their own size.
struct TileWeights {
  Tiles tiles;
  const void* weights;
  Dtype dtype;  // of f32 tiles' weights
  int64_t row_stride, column_stride;  // in elements
  void* out;
  int threads;
};

struct SpikeMatmul {
  const uint32_t* words;  // [rows, words_per_row(length)]
  int64_t rows;
  Tiles tiles;
  const void* weights;
  const float* scale;  // [columns] for integer weights
  const float* bias;   // [columns] or null
  void* out;           // [rows, columns]
  Dtype out_dtype;
  int threads;
};

// dW [length, columns] = spikes^T dy, summed in float32 in blocks of rows, whatever the number of threads.
struct SpikeMatmulGrad {
  const uint32_t* words;  // [rows, words_per_row(length)]
  int64_t rows, length, columns;
  const void* dy;  // [rows, columns]
  Dtype dy_dtype;
  float* dw;
  int threads;
};

#define SPIKECLIP_DECLARE(isa)                           \
  namespace isa {                                        \
  void tile_weights(const TileWeights& call);            \
  void spike_matmul(const SpikeMatmul& call);            \
  void spike_matmul_grad(const SpikeMatmulGrad& call);   \
  }
SPIKECLIP_DECLARE(baseline)
#if defined(__x86_64__)
SPIKECLIP_DECLARE(avx2)
SPIKECLIP_DECLARE(avx512)
#endif
#undef SPIKECLIP_DECLARE

}  // namespace spikeclip
