// Rows of spikes times tiles of weights. A thread walks panels of rows: it decodes a panel's bits into lists once and uses them
// for every tile, so that a tile stays in the first-level cache while the panel's rows add its lines.
#pragma once

#include "events.h"
#include "pack.h"
#include "spike_matmul.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {

struct SumsSlot;

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
  const int64_t strips = tiles.strips();
  const std::vector<Span> spans = spans_of(tiles, source);
  const int64_t number = static_cast<int64_t>(spans.size());
  const int threads = c.rows * strips < 64 ? 1 : c.threads;
  const int64_t panel = ceil_div(c.rows, ceil_div(ceil_div(c.rows, kPanel), threads) * threads);
  const int64_t panels = ceil_div(c.rows, panel);
  // With fewer panels than threads, threads share a panel's strips.
  const int64_t shares = std::min<int64_t>(strips, ceil_div(threads, panels));

  const Padded scale(c.scale, tiles.columns, strips * Kind::kColumns), bias(c.bias, tiles.columns, strips * Kind::kColumns);
  const Output out{c.out, c.out_dtype, tiles.columns, scale.data, bias.data,
                   may_stream(c.out, c.out_dtype, c.rows, tiles.columns)};
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t job = 0; job < panels * shares; ++job) {
    const int64_t share = job % shares, first = job / shares * panel, rows = std::min(panel, c.rows - first);
    std::vector<typename Source::Panel> bits;
    bits.push_back(source.panel(tiles, first, rows));
    std::vector<Lists> lists(static_cast<size_t>(number));
    decode_all(tiles, bits, spans, lists.data());
    auto* sums = number > 1 ? kept<SumsSlot, typename Kind::Wide>(panel * Kind::kColumns) : nullptr;
    for (int64_t strip = share * strips / shares; strip < (share + 1) * strips / shares; ++strip)
      for (int64_t i = 0; i < number; ++i)
        add_lines<Kind>(static_cast<const char*>(c.weights) + tiles.offset(strip, spans[i].first), lists[i], rows,
                        i == 0 ? nullptr : sums, i == number - 1 ? nullptr : sums, out, first, strip * Kind::kColumns);
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
