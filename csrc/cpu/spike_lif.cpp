// Compiled once per instruction set. A thread walks panels of neighbouring rows through all their steps: it decodes the panel's
// bits once, and for every strip of columns adds up one step after the other, so that currents and membranes of a strip stay in
// the caches and only bits leave them. With a pool a panel is a band of one image.
#include "spike_lif.h"

#include "product.h"
#include "windows.h"
#include "words.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {
namespace {

constexpr int64_t kPanelRows = 1024;  // of all steps together
constexpr int64_t kBandRows = 4096;   // the same where neighbouring bands share rows

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
  int64_t largest_out() const { return c.pool_size == 0 ? each : each * c.pooled_width; }

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

// Scratch that a thread keeps from call to call.
template <int kSlot, typename T>
T* kept(int64_t count) {
  thread_local std::unique_ptr<AlignedArray<T>> array;
  thread_local int64_t size = 0;
  if (count > size) {
    array.reset();
    array = std::make_unique<AlignedArray<T>>(count);
    size = count;
  }
  return array->data;
}

template <typename Kind, bool decay_input, bool soft_reset, typename Source>
struct Worker {
  static constexpr int kColumns = Kind::kColumns;
  using Wide = typename Kind::Wide;

  const SpikeLif& c;
  const Source& source;
  const float *scale, *bias;  // padded to whole strips
  LifParams params;
  std::unique_ptr<Lists[]> lists;  // [steps, blocks]
  Wide* sums;                      // [panel rows, kColumns]
  float *currents, *pooled, *membranes;

  Worker(const SpikeLif& c, const Source& source, const Padded& scale, const Padded& bias, const Panels& panels)
      : c(c), source(source), scale(scale.data), bias(bias.data), params(c.params), lists(new Lists[c.steps * c.tiles.blocks()]),
        sums(kept<0, Wide>(panels.largest() * kColumns)), currents(kept<1, float>(panels.largest() * kColumns)),
        pooled(kept<2, float>(kColumns)), membranes(kept<3, float>(panels.largest_out() * kColumns)) {
    params.decay_input = decay_input;
    params.soft_reset = soft_reset;
  }

  void decode(const Panel& panel) {
    const Tiles& tiles = c.tiles;
    const int64_t row_words = words_per_row(tiles.length), blocks = tiles.blocks();
    const int64_t step_rows = c.shape.batch * c.shape.out_height * c.shape.out_width;
    const int64_t window_words = source.scratch(panel.count);
    uint32_t* windows = kept<4, uint32_t>(c.steps * window_words);
    int64_t events = 0;
    std::unique_ptr<const uint32_t*[]> rows(new const uint32_t*[c.steps]);
    for (int64_t t = 0; t < c.steps; ++t) {
      rows[t] = source.rows(t * step_rows + panel.first, panel.count, windows + t * window_words);
      for (int64_t i = 0; i < panel.count * row_words; ++i) events += __builtin_popcount(rows[t][i]);
    }
    const int64_t number = c.steps * blocks;
    uint16_t* offsets = kept<5, uint16_t>(events + 4 * panel.count * number + 16);
    int32_t* starts = kept<6, int32_t>(number * (2 * panel.count + 1));
    for (int64_t i = 0; i < number; ++i) {
      const int64_t block = i % blocks, length = tiles.block_length(block);
      lists[i] = {offsets, starts, starts + panel.count + 1};
      lists[i].decode(reinterpret_cast<const uint8_t*>(rows[i / blocks]) + block * (Kind::kDepth / 8), 4 * row_words,
                      ceil_div(length, 8), panel.count, static_cast<uint16_t>(length * kLine));
      offsets += int64_t{4} * lists[i].start[panel.count];
      starts += 2 * panel.count + 1;
    }
  }

  // One strip of a panel, step after step.
  void strip(const Panel& panel, int64_t strip) {
    const int64_t column = strip * kColumns, blocks = c.tiles.blocks();
    const char* weights = static_cast<const char*>(c.weights);
    const Output to{currents, Dtype::f32, kColumns, scale + column, bias + column, false};
    std::fill(membranes, membranes + panel.out_count * kColumns, params.v_reset);
    for (int64_t t = 0; t < c.steps; ++t) {
      for (int64_t block = 0; block < blocks; ++block)
        add_block<Kind>(weights + c.tiles.offset(strip, block), lists[t * blocks + block], panel.count, sums, block == 0,
                        block == blocks - 1, to, 0, 0);
      if (c.add != nullptr || c.currents != nullptr) exchange(panel, t, column);
      fire(panel, t, column);
    }
  }

  void exchange(const Panel& panel, int64_t t, int64_t column) {
    const int64_t columns = c.tiles.columns, width = std::min<int64_t>(kColumns, columns - column);
    const int64_t rows = c.shape.batch * c.shape.out_height * c.shape.out_width;
    for (int64_t m = 0; m < panel.count; ++m) {
      const int64_t at = (t * rows + panel.first + m) * columns + column;
      float* row = currents + m * kColumns;
      if (c.add != nullptr)
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) row[i] += c.add[at + i];
      if (c.currents != nullptr) memcpy(c.currents + at, row, static_cast<size_t>(width) * 4);
    }
  }

  void fire(const Panel& panel, int64_t t, int64_t column) {
    const int64_t row_words = words_per_row(c.tiles.columns);
    const int64_t rows = c.shape.batch * c.pooled_height * c.pooled_width;
    const int64_t width = std::min<int64_t>(kColumns, c.tiles.columns - column);
    const uint64_t inside = width < 64 ? (uint64_t{1} << width) - 1 : ~uint64_t{0};
    const bool last = column + kColumns >= c.tiles.columns;  // then it also fills its row's last word
    const int64_t halves = last ? 2 * row_words - column / 16 : kColumns / 16;
    for (int64_t m = 0; m < panel.out_count; ++m) {
      const float* current = c.pool_size == 0 ? currents + m * kColumns : pool(panel, m);
      const uint64_t bits = step(current, membranes + m * kColumns) & inside;
      auto* to = reinterpret_cast<uint16_t*>(c.out + (t * rows + panel.out_first + m) * row_words) + column / 16;
      for (int64_t i = 0; i < halves; ++i) to[i] = static_cast<uint16_t>(bits >> (16 * i));
    }
  }

  uint64_t step(const float* current, float* v) const {
    alignas(kLine) float h[kColumns];
#pragma omp simd
    for (int i = 0; i < kColumns; ++i) {
      h[i] = lif_charge(v[i], current[i], params);
      v[i] = lif_reset(h[i], params);
    }
    uint64_t bits = 0;
    for (int i = 0; i < kColumns; i += 16) bits |= static_cast<uint64_t>(reached(h + i, params.v_threshold)) << i;
    return bits;
  }

  const float* pool(const Panel& panel, int64_t m) const {
    const Conv2d& s = c.shape;
    const int64_t top = (panel.out_top + m / c.pooled_width) * c.pool_stride - c.pool_padding;
    const int64_t left = m % c.pooled_width * c.pool_stride - c.pool_padding;
    bool fresh = true;
    for (int64_t y = std::max<int64_t>(0, top); y < std::min(s.out_height, top + c.pool_size); ++y)
      for (int64_t x = std::max<int64_t>(0, left); x < std::min(s.out_width, left + c.pool_size); ++x) {
        const float* row = currents + ((y - panel.top) * s.out_width + x) * kColumns;
        if (fresh) {
          memcpy(pooled, row, sizeof(float) * kColumns);
          fresh = false;
          continue;
        }
#pragma omp simd
        for (int i = 0; i < kColumns; ++i) pooled[i] = row[i] > pooled[i] || row[i] != row[i] ? row[i] : pooled[i];
      }
    return pooled;
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
  const LifParams& p = c.params;
  if (p.decay_input)
    p.soft_reset ? run<Kind, true, true>(c, source) : run<Kind, true, false>(c, source);
  else
    p.soft_reset ? run<Kind, false, true>(c, source) : run<Kind, false, false>(c, source);
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
