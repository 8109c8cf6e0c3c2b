// Products of packed spikes with weights on the CPU, event-driven.
#pragma once

#include <stdint.h>

#include "../lif_step.h"
#include "isas.h"

namespace spikeclip {

enum class WeightKind : int { f32 = 0, i16 = 1, i8 = 2 };

// Columns of a tile (one cache line of a row) and rows of a tile.
inline int64_t tile_columns(WeightKind kind) { return kind == WeightKind::f32 ? 16 : kind == WeightKind::i16 ? 32 : 64; }
constexpr int64_t kTileDepth = 448;

// Lists name lines by where they begin, in units that an address multiplies by for nothing, so that 16 bits reach far.
constexpr int64_t kUnit = 8;               // bytes
constexpr int64_t kLineUnits = 64 / kUnit;

// Consecutive blocks of a tile whose lines one list of spikes names.
struct Span {
  int64_t first, end;
};

// Weights [length, columns] as tiles: per strip of tile_columns columns, per block of at most kTileDepth rows, its rows' lines
// and a line of zeros. A tap's rows (a convolution's channels at one place of its window; all rows of a matrix) either lie in
// one block, with as many other taps as there is room for, or are split into parts of whole bytes of spikes.
// spikeclip/ops/weights.py has the same rule.
struct Tiles {
  WeightKind kind;
  int64_t length, columns, tap;

  int64_t parts() const { return (tap + kTileDepth - 1) / kTileDepth; }
  int64_t part() const { return ((tap + parts() - 1) / parts() + 7) / 8 * 8; }  // rows, where there are several
  int64_t group() const { return kTileDepth / tap; }                      // taps of a block, where there is one part
  int64_t blocks() const { return parts() > 1 ? length / tap * parts() : (length / tap + group() - 1) / group(); }
  int64_t strips() const { return (columns + tile_columns(kind) - 1) / tile_columns(kind); }
  int64_t block_start(int64_t block) const {
    return parts() > 1 ? block / parts() * tap + block % parts() * part() : block * group() * tap;
  }
  int64_t block_length(int64_t block) const {
    const int64_t left = parts() > 1 ? tap - block % parts() * part() : length - block_start(block);
    const int64_t most = parts() > 1 ? part() : group() * tap;
    return left < most ? left : most;
  }
  // Lines of a span, those of zeros included.
  int64_t lines(Span s) const { return block_start(s.end - 1) + block_length(s.end - 1) - block_start(s.first) + s.end - s.first; }
  // Where a block's first line and the span's last line, of zeros, lie, in units from the span's first line.
  uint16_t line(Span s, int64_t block) const {
    return static_cast<uint16_t>((block_start(block) - block_start(s.first) + block - s.first) * kLineUnits);
  }
  uint16_t zeros(Span s) const { return static_cast<uint16_t>((lines(s) - 1) * kLineUnits); }
  int64_t bytes() const { return strips() * (length + blocks()) * 64; }
  int64_t offset(int64_t strip, int64_t block) const {
    return (strip * (length + blocks()) + block_start(block) + block) * 64;
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

SPIKECLIP_FOR_EVERY_ISA(
    void tile_weights(const TileWeights& call);
    void spike_matmul(const SpikeMatmul& call);
    void spike_matmul_grad(const SpikeMatmulGrad& call);)

}  // namespace spikeclip
