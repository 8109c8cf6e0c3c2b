// Compiled once per instruction set. A thread walks panels of rows: it decodes a panel's bits into lists once and uses them for
// every tile of weights, so that a tile stays in the first-level cache while the panel's rows add its lines.
#include "spike_matmul.h"

#include "events.h"
#include "pack.h"
#include "threads.h"
#include "weight_gradient.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {
namespace {

constexpr int64_t kPanel = 1024;

template <typename Kind>
void multiply(const SpikeMatmul& c) {
  const Tiles& tiles = c.tiles;
  const int64_t row_bytes = 4 * words_per_row(tiles.length), strips = tiles.strips(), blocks = tiles.blocks();
  const int threads = c.rows * strips < 64 ? 1 : c.threads;
  const int64_t panels = ceil_div(ceil_div(c.rows, kPanel), threads) * threads, panel = ceil_div(c.rows, panels);
  // With fewer rows than threads, threads share a panel's strips.
  const int64_t shares = std::min<int64_t>(strips, ceil_div(threads, ceil_div(c.rows, panel)));
  const int64_t jobs = ceil_div(c.rows, panel) * shares;

  const Padded scale(c.scale, tiles.columns, strips * Kind::kColumns), bias(c.bias, tiles.columns, strips * Kind::kColumns);
  const Output out{c.out, c.out_dtype, tiles.columns, scale.data, bias.data,
                   may_stream(c.out, c.out_dtype, c.rows, tiles.columns)};

  const int64_t list_size = Lists::capacity(panel, std::min<int64_t>(Kind::kDepth, tiles.length));
  const AlignedArray<uint16_t> offsets(threads * blocks * list_size);
  const AlignedArray<int32_t> starts(threads * blocks * (panel + 1)), events(threads * blocks * panel);
  const AlignedArray<typename Kind::Wide> sums(blocks > 1 ? threads * panel * Kind::kColumns : 1);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t job = 0; job < jobs; ++job) {
    const int64_t me = thread_index();
    const int64_t first = job / shares * panel, rows = std::min(panel, c.rows - first);
    const auto lists = [&](int64_t block) {
      const int64_t at = me * blocks + block;
      return Lists{offsets.data + at * list_size, starts.data + at * (panel + 1), events.data + at * panel};
    };
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t length = tiles.block_length(block);
      lists(block).decode(reinterpret_cast<const uint8_t*>(c.words) + first * row_bytes + block * (Kind::kDepth / 8), row_bytes,
                          ceil_div(length, 8), rows, static_cast<uint16_t>(length * kLine));
    }
    const int64_t share = job % shares;
    typename Kind::Wide* mine = sums.data + (blocks > 1 ? me * panel * Kind::kColumns : 0);
    for (int64_t strip = share * strips / shares; strip < (share + 1) * strips / shares; ++strip)
      for (int64_t block = 0; block < blocks; ++block)
        add_block<Kind>(static_cast<const char*>(c.weights) + tiles.offset(strip, 0, block), lists(block), nullptr, rows, mine,
                        block == 0, block == blocks - 1, out, first, strip * Kind::kColumns);
  }
}

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
  const int64_t columns = tile_columns(tiles.kind), depth = tile_depth(tiles.kind);
  const int threads = tiles.bytes() < (1 << 16) ? 1 : c.threads;
#pragma omp parallel for schedule(static) num_threads(threads) collapse(2)
  for (int64_t strip = 0; strip < tiles.strips(); ++strip)
    for (int64_t group = 0; group < tiles.groups; ++group)
      for (int64_t block = 0; block < tiles.blocks(); ++block) {
        char* tile = static_cast<char*>(c.out) + tiles.offset(strip, group, block);
        const int64_t length = tiles.block_length(block), width = std::min(columns, tiles.columns - strip * columns);
        const int64_t first = group * c.group_stride + block * depth * c.row_stride + strip * columns * c.column_stride;
        const auto same = [](int64_t i) { return i; };
        // Columns beyond the last are never written out; zeros keep them from overflowing or being denormal.
        memset(tile, 0, static_cast<size_t>(length + 1) * kLine);
        if (tiles.kind == WeightKind::i16) {
          const int16_t* weights = static_cast<const int16_t*>(c.weights);
          fill_tile(c, first, length, width, reinterpret_cast<int16_t*>(tile), [=](int64_t at) { return weights[at]; }, same);
        } else if (tiles.kind == WeightKind::i8) {
          const int8_t* weights = static_cast<const int8_t*>(c.weights);
          fill_tile(c, first, length, width, reinterpret_cast<uint8_t*>(tile),
                    [=](int64_t at) { return static_cast<uint8_t>(weights[at] + 128); },
                    [](int64_t i) { return 2 * (i % 32) + i / 32; });
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
  switch (c.tiles.kind) {
    case WeightKind::f32: return multiply<Float32>(c);
    case WeightKind::i16: return multiply<Int16>(c);
    case WeightKind::i8: return multiply<Int8>(c);
  }
}

void spike_matmul_grad(const SpikeMatmulGrad& c) {
  weight_gradient({c.words, c.rows, c.length, c.columns, c.dy, c.dy_dtype, 1, c.dw, c.threads},
                  [](int64_t, int64_t row) { return row; });
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
