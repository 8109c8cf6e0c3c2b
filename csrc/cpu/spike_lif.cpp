// Compiled once per instruction set. A thread walks panels of neighbouring rows through all their steps: it decodes the panel's
// bits once, and for every strip of columns adds up all steps and lets its neurons fire, so that currents and membranes stay in
// the caches and only bits leave them. What several steps have in common is added up once. With a pool a panel is a band of one
// image. Few panels are decoded by all threads together, which then share their strips. (Sums and neurons are two loops over a
// few rows: one loop over both was measured to be up to a tenth slower with int8 weights, and hardly faster with float32.)
#include "spike_lif.h"

#include <limits>
#include <vector>

#include "common_spikes.h"
#include "events.h"
#include "fire.h"
#include "shares.h"
#include "threads.h"
#include "windows.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {
namespace {

constexpr int64_t kPanelRows = 2048;  // of all steps together
constexpr int64_t kBandRows = 4096;   // the same where neighbouring bands share rows
constexpr int64_t kRowsAtOnce = 128;  // of one step, whose currents and membranes stay in the two nearest caches

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
      each = rows <= most ? rows : ceil_div(rows, ceil_div(ceil_div(rows, most), c.threads) * c.threads);
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

  int64_t most_rows() const {
    return c.pool_size == 0 ? each : std::min(c.shape.out_height, (each - 1) * c.pool_stride + c.pool_size) * c.shape.out_width;
  }

  int64_t most_out_rows() const { return c.pool_size == 0 ? each : each * c.pooled_width; }

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

// Brings lines into the second-level cache, a few a call: a burst of them would have to wait for memory.
struct Fetch {
  const char* at = nullptr;
  const char* end = nullptr;
  int64_t share = 0;

  Fetch() = default;
  Fetch(const char* first, int64_t lines, int64_t calls)
      : at(first), end(first + lines * kLine), share(ceil_div(lines, std::max<int64_t>(calls, 1)) * kLine) {}

  void operator()() {
    for (const char* stop = std::min(end, at + share); at < stop; at += kLine) __builtin_prefetch(at, 0, 2);
  }
};

struct SumsSlot;
struct SharedSlot;
struct WordsSlot;
struct CurrentsSlot;
struct MembranesSlot;

template <typename Kind, bool decay_input, bool soft_reset, typename Source>
struct Worker {
  static constexpr int kColumns = Kind::kColumns;
  using Wide = typename Kind::Wide;

  const SpikeLif& c;
  const Source& source;
  const float *scale, *bias;  // padded to whole strips
  const std::vector<Span>& spans;
  const std::vector<Common>& common;
  int64_t number, shared;     // of spans, and of what steps have in common
  int64_t at_once, neurons;   // rows that go through all steps and spans together, and what the pool leaves of them
  Wide* sums;                 // [at_once, kColumns], where several lists make one sum
  Wide* shared_sums;          // [common, at_once, kColumns]
  float* currents;            // [at_once, kColumns]
  float* membranes;           // [neurons, kColumns]

  Worker(const SpikeLif& c, const Source& source, const Padded& scale, const Padded& bias, const Panels& panels,
         const std::vector<Span>& spans, const std::vector<Common>& common)
      : c(c), source(source), scale(scale.data), bias(bias.data), spans(spans), common(common),
        number(static_cast<int64_t>(spans.size())), shared(static_cast<int64_t>(common.size())),
        at_once(c.pool_size != 0 || number > 1 ? panels.most_rows() : std::min(kRowsAtOnce, panels.most_rows())),
        neurons(c.pool_size != 0 ? panels.most_out_rows() : at_once),
        sums(kept<SumsSlot, Wide>(number > 1 || shared > 0 ? at_once * kColumns : 0)),
        shared_sums(kept<SharedSlot, Wide>(shared * at_once * kColumns)),
        currents(kept<CurrentsSlot, float>(at_once * kColumns)), membranes(kept<MembranesSlot, float>(neurons * kColumns)) {}

  // Items are every panel's steps and then what these have in common. Decodes items `begin` to `end` into lists [items, spans],
  // which lie in this thread's memory. `first` is the strip that it takes then: its tiles are fetched.
  void decode(const Panels& panels, int64_t begin, int64_t end, Lists* to, int64_t first) {
    const int64_t each = c.steps + shared, step_rows = c.shape.batch * c.shape.out_height * c.shape.out_width;
    std::vector<typename Source::Panel> items;
    int64_t rows = 0;
    for (int64_t item = begin; item < end; ++item) {
      const Panel panel = panels[item / each];
      items.push_back(source.panel(c.tiles, item % each * step_rows + panel.first, panel.count));
      rows += panel.count;
    }
    Fetch fetch(tile(first, 0), c.tiles.length + c.tiles.blocks(), rows * number);
    decode_all(c.tiles, items, spans, to, [&] { fetch(); });
  }

  const char* tile(int64_t strip, int64_t block) const {
    return static_cast<const char*>(c.weights) + c.tiles.offset(strip, block);
  }

  // `lists` are the panel's; `next` is the strip that this thread most likely takes next: its tiles are fetched meanwhile
  // (-1: none).
  void strip(const Panel& panel, const Lists* lists, int64_t strip, int64_t next) {
    Fetch fetch;
    const int64_t calls = ceil_div(panel.count, kFew) * (c.steps + shared) * number;
    if (next >= 0) fetch = {tile(next, 0), c.tiles.length + c.tiles.blocks(), calls};
    const int64_t column = strip * kColumns;
    const auto finished = [to = currents, scale = scale + column, bias = bias + column](int64_t m, const Sums<Kind>& sum) {
      finish<Kind>(sum, scale, bias, to + m * kColumns);
    };
    for (int64_t first = 0; first < panel.count; first += at_once) {
      const int64_t rows = std::min(at_once, panel.count - first);
      std::fill(membranes, membranes + neurons * kColumns, c.params.v_reset);
      for (int64_t t = -shared; t < c.steps; ++t) {  // what steps have in common, then the steps
        const bool own = t >= 0;
        const Lists* list = lists + (own ? t : c.steps + shared + t) * number;
        const Wide* from = own ? started(t, rows) : nullptr;
        Wide* to = own ? sums : shared_sums + (shared + t) * at_once * kColumns;
        for (int64_t i = 0; i < number; ++i) {
          const bool last = own && i == number - 1;
          add_lines<Kind>(tile(strip, spans[i].first), list[i].from(first), rows, from, last ? nullptr : to, finished,
                          [&] { fetch(); });
          from = to;
        }
        if (!own) continue;
        if (c.pool_size != 0) {
          fire_pooled(panel, t, column);
        } else {
          if (c.add != nullptr || c.currents != nullptr) exchange(panel, t, first, rows, column);
          fire(t, panel.out_first + first, rows, column, currents, membranes);
        }
      }
    }
  }

  // Where step t's own sums begin: at what it has in common with others, null if nothing.
  const Wide* started(int64_t t, int64_t rows) const {
    const Wide* all = nullptr;
    for (int64_t n = 0; n < shared; ++n) {
      if (!common[n].has(t)) continue;
      const Wide* more = shared_sums + n * at_once * kColumns;
      if (all != nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < rows * kColumns; ++i) sums[i] = all[i] + more[i];
      }
      all = all == nullptr ? more : sums;
    }
    return all;
  }

  void fire_pooled(const Panel& panel, int64_t t, int64_t column) {
    alignas(kLine) float largest[kColumns];
    for (int64_t m = 0; m < panel.out_count; ++m) {
      pool(panel, m, largest);
      fire(t, panel.out_first + m, 1, column, largest, membranes + m * kColumns);
    }
  }

  // Adds the stream to the currents of `rows` rows from the panel's row `first` on, and keeps them.
  void exchange(const Panel& panel, int64_t t, int64_t first, int64_t rows, int64_t column) const {
    const int64_t columns = c.tiles.columns, width = std::min<int64_t>(kColumns, columns - column);
    const int64_t step_rows = c.shape.batch * c.shape.out_height * c.shape.out_width;
    const int64_t at = (t * step_rows + panel.first + first) * columns + column;
    const auto all = [&](int64_t width) {
      for (int64_t m = 0; m < rows; ++m) {
        float* current = currents + m * kColumns;
        if (c.add != nullptr)
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) current[i] += c.add[at + m * columns + i];
        if (c.currents != nullptr) memcpy(c.currents + at + m * columns, current, static_cast<size_t>(width) * 4);
      }
    };
    width == kColumns ? all(kColumns) : all(width);
  }

  // One step of `rows` rows' neurons: membranes change, spikes go out as bits from row `row` of the output on.
  void fire(int64_t t, int64_t row, int64_t rows, int64_t column, const float* current, float* v) const {
    const int64_t row_words = words_per_row(c.tiles.columns), step_rows = c.shape.batch * c.pooled_height * c.pooled_width;
    const int64_t width = c.tiles.columns - column, row_halves = 2 * row_words;
    auto* to = reinterpret_cast<uint16_t*>(c.out + (t * step_rows + row) * row_words) + column / 16;
    const LifParams params = c.params;
    if (width > kColumns || (width == kColumns && column / 16 + kColumns / 16 == row_halves)) {
      for (int64_t m = 0; m < rows; ++m) {
        const uint64_t bits = fire_row<kColumns, decay_input, soft_reset>(current + m * kColumns, v + m * kColumns, params);
        memcpy(to + m * row_halves, &bits, kColumns / 8);
      }
      return;
    }
    const uint64_t inside = width < 64 ? (uint64_t{1} << width) - 1 : ~uint64_t{0};
    for (int64_t m = 0; m < rows; ++m) {  // the last columns also fill their row's last word
      const uint64_t bits = fire_row<kColumns, decay_input, soft_reset>(current + m * kColumns, v + m * kColumns, params) & inside;
      for (int64_t i = 0; i < row_halves - column / 16; ++i) to[m * row_halves + i] = static_cast<uint16_t>(bits >> (16 * i));
    }
  }

  void pool(const Panel& panel, int64_t m, float* largest) const {
    const Conv2d& s = c.shape;
    const int64_t top = (panel.out_top + m / c.pooled_width) * c.pool_stride - c.pool_padding;
    const int64_t left = m % c.pooled_width * c.pool_stride - c.pool_padding;
    std::fill(largest, largest + kColumns, -std::numeric_limits<float>::infinity());
    for (int64_t y = std::max<int64_t>(0, top); y < std::min(s.out_height, top + c.pool_size); ++y)
      for (int64_t x = std::max<int64_t>(0, left); x < std::min(s.out_width, left + c.pool_size); ++x) {
        const float* row = currents + ((y - panel.top) * s.out_width + x) * kColumns;
#pragma omp simd
        for (int i = 0; i < kColumns; ++i) largest[i] = row[i] > largest[i] || row[i] != row[i] ? row[i] : largest[i];
      }
  }
};

// `source` has rows for every step and then for what they have in common.
template <typename Kind, bool decay_input, bool soft_reset, typename Source>
void run(const SpikeLif& c, const Source& source, const std::vector<Common>& common) {
  const int64_t strips = c.tiles.strips();
  const Padded scale(c.scale, c.tiles.columns, strips * Kind::kColumns);
  const Padded bias(c.bias, c.tiles.columns, strips * Kind::kColumns);
  const Panels panels(c);
  const int threads = c.steps * panels.rows * strips < 64 ? 1 : c.threads;
  const std::vector<Span> spans = spans_of(c.tiles, source);
  const int64_t items = c.steps + static_cast<int64_t>(common.size()), number = static_cast<int64_t>(spans.size());
  const bool together = panels.number <= 2 * threads;
  const std::unique_ptr<Lists[]> all(together ? new Lists[panels.number * items * number] : nullptr);
  Shares shares(panels.number * strips, threads);
#pragma omp parallel num_threads(threads)
  {
    Worker<Kind, decay_input, soft_reset, Source> worker(c, source, scale, bias, panels, spans, common);
    if (together) {
      const int64_t me = thread_index(), team = team_size(), decoded = panels.number * items;
      const int64_t begin = ceil_div(me * decoded, team), end = ceil_div((me + 1) * decoded, team);
      worker.decode(panels, begin, end, all.get() + begin * number, shares.first(me) % strips);
#pragma omp barrier
      for (auto item = shares.take(me); item.index >= 0; item = shares.take(me)) {
        const int64_t i = item.index / strips;
        worker.strip(panels[i], all.get() + i * items * number, item.index % strips, item.next < 0 ? -1 : item.next % strips);
      }
    } else {
      const std::unique_ptr<Lists[]> own(new Lists[items * number]);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < panels.number; ++i) {
        worker.decode(panels, i * items, (i + 1) * items, own.get(), 0);
        for (int64_t strip = 0; strip < strips; ++strip) worker.strip(panels[i], own.get(), strip, (strip + 1) % strips);
      }
    }
  }
}

template <typename Kind, typename Source>
void run_neuron(const SpikeLif& c, const Source& source, const std::vector<Common>& common) {
  by_flags(c.params.decay_input, c.params.soft_reset, [&](auto decay_input, auto soft_reset) {
    run<Kind, decltype(decay_input)::value, decltype(soft_reset)::value>(c, source, common);
  });
}

template <typename Source>
void run_kind(const SpikeLif& c, const Source& source, const std::vector<Common>& common) {
  switch (c.tiles.kind) {
    case WeightKind::f32: return run_neuron<Float32>(c, source, common);
    case WeightKind::i16: return run_neuron<Int16>(c, source, common);
    case WeightKind::i8: return run_neuron<Int8>(c, source, common);
  }
}

int64_t taps_of(const SpikeLif& c) { return c.shape.kernel_height * c.shape.kernel_width; }

// What another row of bits costs beside its lines, in lines: to begin and end its lists for every strip (one, but where sums of
// 16 bits hold no more than a block), and to decode it for all of them. Measured.
double row_lines(const SpikeLif& c) {
  constexpr int64_t kList = 18, kWord = 6, kTap = 4;
  const int64_t lists = c.tiles.kind == WeightKind::i16 ? c.tiles.blocks() : 1;
  const int64_t decoded = kWord * words_per_row(c.channels) + kTap * taps_of(c);
  return static_cast<double>(kList * lists) + static_cast<double>(decoded) / static_cast<double>(c.tiles.strips());
}

}  // namespace

void spike_lif(const SpikeLif& c) {
  const int64_t stride = c.shape.batch * c.shape.height * c.shape.width * words_per_row(c.channels);
  const std::vector<Common> common = choose_common(c.words, c.steps, stride, taps_of(c) * words_per_row(c.channels), row_lines(c));
  const int64_t steps = c.steps + static_cast<int64_t>(common.size());
  const uint32_t* words = c.words;
  if (!common.empty()) {
    uint32_t* apart = kept<WordsSlot, uint32_t>(steps * stride);
    take_apart(c.words, c.steps, stride, common, c.threads, apart);
    words = apart;
  }
  if (!c.convolution) return run_kind(c, PackedRows{words, steps * c.shape.batch, c.channels}, common);
  Conv2d every = c.shape;
  every.batch *= steps;
  run_kind(c, Windows{every, words, c.channels}, common);
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
