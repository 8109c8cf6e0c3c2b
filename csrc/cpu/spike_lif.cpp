// Compiled once per instruction set. A thread walks panels of neighbouring rows through all their steps: it decodes the panel's
// bits once, and for every strip of columns adds up all steps and lets its neurons fire, so that currents and membranes stay in
// the caches and only bits leave them. With a pool a panel is a band of one image. (Sums and neurons are two loops over a few
// rows: one loop over both was measured to be up to half slower.)
#include "spike_lif.h"

#include <limits>
#include <vector>

#include "fire.h"
#include "product.h"
#include "windows.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {
namespace {

constexpr int64_t kPanelRows = 1024;  // of all steps together
constexpr int64_t kBandRows = 4096;   // the same where neighbouring bands share rows
constexpr int64_t kRowsAtOnce = 64;   // of one step, whose currents and membranes fit the first-level cache

// Rows of one step: of the product, and of what the pool leaves.
struct Panel {
  int64_t first, count;
  int64_t out_first, out_count;
  int64_t top, out_top;  // image rows that `first` and `out_first` begin, with a pool
};

struct Panels {
  const SpikeLif& c;
  int64_t rows, each, bands, number;

  explicit Panels(const SpikeLif& c) : c(c) {
    const Conv2d& s = c.shape;
    rows = s.batch * s.out_height * s.out_width;
    if (c.pool_size == 0) {
      const int64_t most = std::max<int64_t>(1, kPanelRows / c.steps);
      each = ceil_div(rows, ceil_div(ceil_div(rows, most), c.threads) * c.threads);
      bands = 1;
      number = ceil_div(rows, each);
    } else {
      const int64_t high = std::max<int64_t>(1, kBandRows / c.steps / s.out_width);  // image rows
      each = std::clamp<int64_t>((high - c.pool_size) / c.pool_stride + 1, 1, c.pooled_height);
      bands = ceil_div(c.pooled_height, each);
      each = ceil_div(c.pooled_height, bands);
      number = s.batch * bands;
    }
  }

  int64_t largest() const {
    return c.pool_size == 0 ? each : std::min(c.shape.out_height, (each - 1) * c.pool_stride + c.pool_size) * c.shape.out_width;
  }

  Panel operator[](int64_t i) const {
    const Conv2d& s = c.shape;
    if (c.pool_size == 0) {
      const int64_t first = i * each, count = std::min(each, rows - first);
      return {first, count, first, count, 0, 0};
    }
    const int64_t image = i / bands, out_top = i % bands * each, out_end = std::min(out_top + each, c.pooled_height);
    const int64_t top = std::max<int64_t>(0, out_top * c.pool_stride - c.pool_padding);
    const int64_t end = std::min(s.out_height, (out_end - 1) * c.pool_stride - c.pool_padding + c.pool_size);
    return {(image * s.out_height + top) * s.out_width, (end - top) * s.out_width,
            (image * c.pooled_height + out_top) * c.pooled_width, (out_end - out_top) * c.pooled_width, top, out_top};
  }
};

struct SumsSlot;
struct CurrentsSlot;
struct MembranesSlot;
struct OffsetsSlot;
struct StartsSlot;

template <typename Kind, bool decay_input, bool soft_reset, typename Source>
struct Worker {
  static constexpr int kColumns = Kind::kColumns;
  using Wide = typename Kind::Wide;

  const SpikeLif& c;
  const Source& source;
  const float *scale, *bias;  // padded to whole strips
  std::unique_ptr<Lists[]> lists;  // [steps, blocks]
  Wide* sums;                      // [steps, panel rows, kColumns], where there are several blocks
  float* currents;                 // [steps, panel rows, kColumns] with a pool, else [kRowsAtOnce, kColumns]
  float* membranes;                // [kRowsAtOnce, kColumns]

  Worker(const SpikeLif& c, const Source& source, const Padded& scale, const Padded& bias, const Panels& panels)
      : c(c), source(source), scale(scale.data), bias(bias.data), lists(new Lists[c.steps * c.tiles.blocks()]),
        sums(kept<SumsSlot, Wide>(c.tiles.blocks() > 1 ? c.steps * panels.largest() * kColumns : 0)),
        currents(kept<CurrentsSlot, float>((c.pool_size != 0 ? c.steps * panels.largest() : kRowsAtOnce) * kColumns)),
        membranes(kept<MembranesSlot, float>(kRowsAtOnce * kColumns)) {}

  void decode(const Panel& panel) {
    const Tiles& tiles = c.tiles;
    const int64_t blocks = tiles.blocks(), step_rows = c.shape.batch * c.shape.out_height * c.shape.out_width;
    std::vector<typename Source::Panel> steps;
    int64_t events = 0;
    for (int64_t t = 0; t < c.steps; ++t) {
      steps.push_back(source.panel(tiles, t * step_rows + panel.first, panel.count));
      events += steps.back().events();
    }
    const int64_t number = c.steps * blocks;
    uint16_t* offsets = kept<OffsetsSlot, uint16_t>(events + 4 * panel.count * number + kSpill);
    int32_t* starts = kept<StartsSlot, int32_t>(number * (2 * panel.count + 1));
    for (int64_t i = 0; i < number; ++i) {
      lists[i] = {offsets, starts, starts + panel.count + 1};
      steps[i / blocks].decode(tiles, i % blocks, lists[i]);
      offsets += int64_t{4} * lists[i].start[panel.count];
      starts += 2 * panel.count + 1;
    }
  }

  const Lists& list(int64_t t, int64_t block) const { return lists[t * c.tiles.blocks() + block]; }
  const char* tile(int64_t strip, int64_t block) const {
    return static_cast<const char*>(c.weights) + c.tiles.offset(strip, block);
  }

  void strip(const Panel& panel, int64_t strip) {
    const int64_t last = c.tiles.blocks() - 1, column = strip * kColumns, count = panel.count;
    const Output to{currents, Dtype::f32, kColumns, scale + column, bias + column, false};
    for (int64_t block = 0; block < last; ++block)
      for (int64_t t = 0; t < c.steps; ++t)
        add_block<Kind>(tile(strip, block), list(t, block), count, sums + t * count * kColumns, block == 0, false, to, 0, 0);
    if (c.pool_size != 0) {
      for (int64_t t = 0; t < c.steps; ++t)
        add_block<Kind>(tile(strip, last), list(t, last), count, sums + t * count * kColumns, last == 0, true, to, t * count, 0);
      fire_pooled(panel, column);
      return;
    }
    for (int64_t first = 0; first < count; first += kRowsAtOnce) {
      const int64_t rows = std::min(kRowsAtOnce, count - first);
      std::fill(membranes, membranes + rows * kColumns, c.params.v_reset);
      for (int64_t t = 0; t < c.steps; ++t) {
        add_block<Kind>(tile(strip, last), list(t, last).from(first), rows, sums + (t * count + first) * kColumns, last == 0,
                        true, to, 0, 0);
        if (c.add != nullptr || c.currents != nullptr)
          for (int64_t m = 0; m < rows; ++m) exchange(panel, t, first + m, column, currents + m * kColumns);
        for (int64_t m = 0; m < rows; ++m)
          fire(panel, t, first + m, column, currents + m * kColumns, membranes + m * kColumns);
      }
    }
  }

  void fire_pooled(const Panel& panel, int64_t column) {
    alignas(kLine) float largest[kColumns];
    for (int64_t m = 0; m < panel.out_count; ++m) {
      std::fill(membranes, membranes + kColumns, c.params.v_reset);
      for (int64_t t = 0; t < c.steps; ++t) {
        pool(panel, t, m, largest);
        fire(panel, t, m, column, largest, membranes);
      }
    }
  }

  void exchange(const Panel& panel, int64_t t, int64_t m, int64_t column, float* current) const {
    const int64_t columns = c.tiles.columns, width = std::min<int64_t>(kColumns, columns - column);
    const int64_t rows = c.shape.batch * c.shape.out_height * c.shape.out_width;
    const int64_t at = (t * rows + panel.first + m) * columns + column;
    if (c.add != nullptr)
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) current[i] += c.add[at + i];
    if (c.currents != nullptr) memcpy(c.currents + at, current, static_cast<size_t>(width) * 4);
  }

  void fire(const Panel& panel, int64_t t, int64_t m, int64_t column, const float* current, float* v) const {
    const int64_t row_words = words_per_row(c.tiles.columns), rows = c.shape.batch * c.pooled_height * c.pooled_width;
    const int64_t width = std::min<int64_t>(kColumns, c.tiles.columns - column);
    const uint64_t inside = width < 64 ? (uint64_t{1} << width) - 1 : ~uint64_t{0};
    const bool last = column + kColumns >= c.tiles.columns;  // then it also fills its row's last word
    const int64_t halves = last ? 2 * row_words - column / 16 : kColumns / 16;
    const uint64_t bits = fire_row<kColumns, decay_input, soft_reset>(current, v, c.params) & inside;
    auto* to = reinterpret_cast<uint16_t*>(c.out + (t * rows + panel.out_first + m) * row_words) + column / 16;
    for (int64_t i = 0; i < halves; ++i) to[i] = static_cast<uint16_t>(bits >> (16 * i));
  }

  void pool(const Panel& panel, int64_t t, int64_t m, float* largest) const {
    const Conv2d& s = c.shape;
    const int64_t top = (panel.out_top + m / c.pooled_width) * c.pool_stride - c.pool_padding;
    const int64_t left = m % c.pooled_width * c.pool_stride - c.pool_padding;
    std::fill(largest, largest + kColumns, -std::numeric_limits<float>::infinity());
    for (int64_t y = std::max<int64_t>(0, top); y < std::min(s.out_height, top + c.pool_size); ++y)
      for (int64_t x = std::max<int64_t>(0, left); x < std::min(s.out_width, left + c.pool_size); ++x) {
        const float* row = currents + (t * panel.count + (y - panel.top) * s.out_width + x) * kColumns;
#pragma omp simd
        for (int i = 0; i < kColumns; ++i) largest[i] = row[i] > largest[i] || row[i] != row[i] ? row[i] : largest[i];
      }
  }
};

template <typename Kind, bool decay_input, bool soft_reset, typename Source>
void run(const SpikeLif& c, const Source& source) {
  const int64_t strips = c.tiles.strips();
  const Padded scale(c.scale, c.tiles.columns, strips * Kind::kColumns);
  const Padded bias(c.bias, c.tiles.columns, strips * Kind::kColumns);
  const Panels panels(c);
  const int threads = c.steps * panels.rows * strips < 64 ? 1 : c.threads;
  const int64_t shares = std::min<int64_t>(strips, ceil_div(threads, panels.number));
#pragma omp parallel num_threads(threads)
  {
    Worker<Kind, decay_input, soft_reset, Source> worker(c, source, scale, bias, panels);
#pragma omp for schedule(dynamic, 1)
    for (int64_t job = 0; job < panels.number * shares; ++job) {
      const Panel panel = panels[job / shares];
      const int64_t share = job % shares;
      worker.decode(panel);
      for (int64_t i = share * strips / shares; i < (share + 1) * strips / shares; ++i) worker.strip(panel, i);
    }
  }
}

template <typename Kind, typename Source>
void run_neuron(const SpikeLif& c, const Source& source) {
  by_flags(c.params.decay_input, c.params.soft_reset, [&](auto decay_input, auto soft_reset) {
    run<Kind, decltype(decay_input)::value, decltype(soft_reset)::value>(c, source);
  });
}

template <typename Source>
void run_kind(const SpikeLif& c, const Source& source) {
  switch (c.tiles.kind) {
    case WeightKind::f32: return run_neuron<Float32>(c, source);
    case WeightKind::i16: return run_neuron<Int16>(c, source);
    case WeightKind::i8: return run_neuron<Int8>(c, source);
  }
}

}  // namespace

void spike_lif(const SpikeLif& c) {
  if (!c.convolution) return run_kind(c, PackedRows{c.words, words_per_row(c.channels)});
  Conv2d every = c.shape;
  every.batch *= c.steps;
  run_kind(c, Windows{every, c.words, c.channels});
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
