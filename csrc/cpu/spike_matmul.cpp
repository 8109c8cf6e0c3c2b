// Compiled once per instruction set.
#include "spike_matmul.h"

#include "product.h"
#include "weight_gradient.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {
namespace {

// Lines of one tile from `weights`, whose element (row, column) lies at row * row_stride + column * column_stride.
template <typename T, typename Load, typename Place>
void fill_tile(const TileWeights& c, int64_t first, int64_t length, int64_t width, T* tile, Load load, Place place) {
  constexpr int64_t kColumns = kLine / sizeof(T);
  if (c.column_stride == 1) {
    for (int64_t row = 0; row < length; ++row)
      for (int64_t i = 0; i < width; ++i) tile[row * kColumns + place(i)] = load(first + row * c.row_stride + i);
  } else {
    for (int64_t i = 0; i < width; ++i)
      for (int64_t row = 0; row < length; ++row)
        tile[row * kColumns + place(i)] = load(first + row * c.row_stride + i * c.column_stride);
  }
}

}  // namespace

void tile_weights(const TileWeights& c) {
  const Tiles& tiles = c.tiles;
  const int64_t columns = tile_columns(tiles.kind);
  const int threads = tiles.bytes() < (1 << 16) ? 1 : c.threads;
#pragma omp parallel for schedule(static) num_threads(threads) collapse(2)
  for (int64_t strip = 0; strip < tiles.strips(); ++strip)
    for (int64_t block = 0; block < tiles.blocks(); ++block) {
      char* tile = static_cast<char*>(c.out) + tiles.offset(strip, block);
      const int64_t length = tiles.block_length(block), width = std::min(columns, tiles.columns - strip * columns);
      const int64_t first = tiles.block_start(block) * c.row_stride + strip * columns * c.column_stride;
      const auto same = [](int64_t i) { return i; };
      // Columns beyond the last are never written out; zeros keep them from overflowing or being denormal.
      memset(tile, 0, static_cast<size_t>(length + 1) * kLine);
      if (tiles.kind == WeightKind::i16) {
        const int16_t* weights = static_cast<const int16_t*>(c.weights);
        fill_tile(c, first, length, width, reinterpret_cast<int16_t*>(tile), [=](int64_t at) { return weights[at]; }, Int16::place);
      } else if (tiles.kind == WeightKind::i8) {
        const int8_t* weights = static_cast<const int8_t*>(c.weights);
        fill_tile(c, first, length, width, reinterpret_cast<uint8_t*>(tile),
                  [=](int64_t at) { return static_cast<uint8_t>(weights[at] + 128); }, Int8::place);
      } else if (c.dtype == Dtype::f32) {
        const float* weights = static_cast<const float*>(c.weights);
        fill_tile(c, first, length, width, reinterpret_cast<float*>(tile), [=](int64_t at) { return weights[at]; }, same);
      } else {
        fill_tile(c, first, length, width, reinterpret_cast<float*>(tile),
                  [&c](int64_t at) { return load_value(c.weights, c.dtype, at); }, same);
      }
    }
}

void spike_matmul(const SpikeMatmul& c) {
  multiply({c.rows, c.tiles, c.weights, c.scale, c.bias, c.out, c.out_dtype, c.threads},
           PackedRows{c.words, c.rows, c.tiles.length});
}

void spike_matmul_grad(const SpikeMatmulGrad& c) {
  const PackedRows spikes{c.words, c.rows, c.length};
  RowGradient<PackedRows> plan(spikes, c.rows, c.length, c.columns, c.dw);
  weight_gradient({c.columns, c.dy, c.dy_dtype, c.rows, c.threads}, plan);
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
