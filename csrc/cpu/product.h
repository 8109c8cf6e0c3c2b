// Rows of spikes times tiles of weights. A thread walks panels of rows: it decodes a panel's bits into lists once and uses them
// for every tile, so that a tile stays in the first-level cache while the panel's rows add its lines.
#pragma once

#include "events.h"
#include "pack.h"
#include "spike_matmul.h"
#include "threads.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {

struct Product {
  int64_t rows;
  Tiles tiles;
  const void* weights;
  const float* scale;
  const float* bias;
  void* out;  // [rows, columns]
  Dtype out_dtype;
  int threads;
};

template <typename Kind, typename Source>
void multiply_by(const Product& c, const Source& source) {
  constexpr int64_t kPanel = 1024;
  const Tiles& tiles = c.tiles;
  const int64_t strips = tiles.strips(), blocks = tiles.blocks();
  const int threads = c.rows * strips < 64 ? 1 : c.threads;
  const int64_t panel = ceil_div(c.rows, ceil_div(ceil_div(c.rows, kPanel), threads) * threads);
  const int64_t panels = ceil_div(c.rows, panel);
  // With fewer panels than threads, threads share a panel's strips.
  const int64_t shares = std::min<int64_t>(strips, ceil_div(threads, panels));

  const Padded scale(c.scale, tiles.columns, strips * Kind::kColumns), bias(c.bias, tiles.columns, strips * Kind::kColumns);
  const Output out{c.out, c.out_dtype, tiles.columns, scale.data, bias.data,
                   may_stream(c.out, c.out_dtype, c.rows, tiles.columns)};
  const int64_t list_size = Lists::capacity(panel, std::min(kTileDepth, tiles.length));
  const AlignedArray<uint16_t> offsets(threads * blocks * list_size);
  const AlignedArray<int32_t> starts(threads * blocks * (panel + 1)), events(threads * blocks * panel);
  const AlignedArray<typename Kind::Wide> sums(blocks > 1 ? threads * panel * Kind::kColumns : 0);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t job = 0; job < panels * shares; ++job) {
    const int64_t me = thread_index(), share = job % shares;
    const int64_t first = job / shares * panel, rows = std::min(panel, c.rows - first);
    const auto lists = [&](int64_t block) {
      const int64_t at = me * blocks + block;
      return Lists{offsets.data + at * list_size, starts.data + at * (panel + 1), events.data + at * panel};
    };
    const auto bits = source.panel(tiles, first, rows);
    for (int64_t block = 0; block < blocks; ++block) {
      Lists mine = lists(block);
      bits.decode(tiles, block, mine);
    }
    typename Kind::Wide* mine = blocks > 1 ? sums.data + me * panel * Kind::kColumns : nullptr;
    for (int64_t strip = share * strips / shares; strip < (share + 1) * strips / shares; ++strip)
      for (int64_t block = 0; block < blocks; ++block)
        add_block<Kind>(static_cast<const char*>(c.weights) + tiles.offset(strip, block), lists(block), rows, mine,
                        block == 0, block == blocks - 1, out, first, strip * Kind::kColumns);
  }
}

template <typename Source>
void multiply(const Product& c, const Source& source) {
  switch (c.tiles.kind) {
    case WeightKind::f32: return multiply_by<Float32>(c, source);
    case WeightKind::i16: return multiply_by<Int16>(c, source);
    case WeightKind::i8: return multiply_by<Int8>(c, source);
  }
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
