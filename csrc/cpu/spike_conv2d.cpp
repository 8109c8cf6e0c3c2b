// Compiled once per instruction set. As for products, with one tile per tap: a panel is a run of output rows, whose input rows
// are decoded once for all taps and all tiles.
#include "spike_conv2d.h"

#include "threads.h"
#include "weight_gradient.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {
namespace {

constexpr int64_t kPanelPixels = 1024;

// Output rows [first, first + rows) of all images' rows end to end, and the input rows they meet, likewise.
struct Panel {
  int64_t first, rows, input_first, input_rows;

  Panel(const Conv2d& s, int64_t first, int64_t rows) : first(first), rows(rows) {
    const int64_t last = first + rows - 1;
    const int64_t top = Conv2d::input(first % s.out_height, 0, s.stride_height, s.pad_height);
    const int64_t bottom = Conv2d::input(last % s.out_height, s.kernel_height - 1, s.stride_height, s.pad_height);
    input_first = first / s.out_height * s.height + std::clamp<int64_t>(top, 0, s.height - 1);
    input_rows = last / s.out_height * s.height + std::clamp<int64_t>(bottom, 0, s.height - 1) - input_first + 1;
  }

  // The list that each output pixel of the panel takes at tap (y, x).
  void map(const Conv2d& s, int64_t y, int64_t x, int32_t* source) const {
    for (int64_t r = first; r < first + rows; ++r) {
      const int64_t row = Conv2d::input(r % s.out_height, y, s.stride_height, s.pad_height);
      const int64_t base = (r / s.out_height * s.height + row - input_first) * s.width;
      for (int64_t o = 0; o < s.out_width; ++o) {
        const int64_t column = Conv2d::input(o, x, s.stride_width, s.pad_width);
        const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
        *source++ = inside ? static_cast<int32_t>(base + column) : -1;
      }
    }
  }
};

template <typename Kind>
void convolve(const SpikeConv2d& c) {
  const Conv2d& s = c.shape;
  const Tiles& tiles = c.tiles;
  const int64_t pixel_bytes = 4 * words_per_row(tiles.length), strips = tiles.strips(), blocks = tiles.blocks();
  const int64_t all_rows = s.batch * s.out_height, taps = tiles.groups;
  const int64_t most = std::max<int64_t>(1, kPanelPixels / s.out_width);
  const int64_t panels = ceil_div(ceil_div(all_rows, most), c.threads) * c.threads, panel = ceil_div(all_rows, panels);
  const int64_t shares = std::min<int64_t>(strips, ceil_div(c.threads, ceil_div(all_rows, panel)));
  const int64_t jobs = ceil_div(all_rows, panel) * shares;
  const auto panel_of = [&](int64_t job) {
    const int64_t first = job / shares * panel;
    return Panel(s, first, std::min(panel, all_rows - first));
  };
  int64_t inputs = 0;
  for (int64_t job = 0; job < jobs; job += shares) inputs = std::max(inputs, panel_of(job).input_rows * s.width);

  const Padded scale(c.scale, tiles.columns, strips * Kind::kColumns), bias(c.bias, tiles.columns, strips * Kind::kColumns);
  const Output out{c.out, c.out_dtype, tiles.columns, scale.data, bias.data,
                   may_stream(c.out, c.out_dtype, all_rows * s.out_width, tiles.columns)};
  const int64_t list_size = Lists::capacity(inputs, std::min<int64_t>(Kind::kDepth, tiles.length));
  const int64_t outputs = panel * s.out_width;
  const AlignedArray<uint16_t> offsets(c.threads * blocks * list_size);
  const AlignedArray<int32_t> starts(c.threads * blocks * (inputs + 1)), events(c.threads * blocks * inputs);
  const AlignedArray<int32_t> sources(c.threads * taps * outputs);
  const AlignedArray<typename Kind::Wide> sums(c.threads * outputs * Kind::kColumns);
#pragma omp parallel for schedule(dynamic, 1) num_threads(c.threads)
  for (int64_t job = 0; job < jobs; ++job) {
    const int64_t me = thread_index(), share = job % shares;
    const Panel p = panel_of(job);
    const auto lists = [&](int64_t block) {
      const int64_t at = me * blocks + block;
      return Lists{offsets.data + at * list_size, starts.data + at * (inputs + 1), events.data + at * inputs};
    };
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t length = tiles.block_length(block);
      lists(block).decode(
          reinterpret_cast<const uint8_t*>(c.words) + p.input_first * s.width * pixel_bytes + block * (Kind::kDepth / 8),
          pixel_bytes, ceil_div(length, 8), p.input_rows * s.width, static_cast<uint16_t>(length * kLine));
    }
    int32_t* source = sources.data + me * taps * outputs;
    for (int64_t tap = 0; tap < taps; ++tap) p.map(s, tap / s.kernel_width, tap % s.kernel_width, source + tap * outputs);
    for (int64_t strip = share * strips / shares; strip < (share + 1) * strips / shares; ++strip)
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t block = 0; block < blocks; ++block)
          add_block<Kind>(static_cast<const char*>(c.weights) + tiles.offset(strip, tap, block), lists(block),
                          source + tap * outputs, p.rows * s.out_width, sums.data + me * outputs * Kind::kColumns,
                          tap == 0 && block == 0, tap == taps - 1 && block == blocks - 1, out, p.first * s.out_width,
                          strip * Kind::kColumns);
  }
}

}  // namespace

void spike_conv2d(const SpikeConv2d& c) {
  switch (c.tiles.kind) {
    case WeightKind::f32: return convolve<Float32>(c);
    case WeightKind::i16: return convolve<Int16>(c);
    case WeightKind::i8: return convolve<Int8>(c);
  }
}

void spike_conv2d_grad(const SpikeConv2dGrad& c) {
  const Conv2d& s = c.shape;
  const auto source = [&s](int64_t tap, int64_t pixel) -> int64_t {
    const int64_t column = pixel % s.width, row = pixel / s.width % s.height, image = pixel / s.width / s.height;
    const int64_t y = Conv2d::output(row, tap / s.kernel_width, s.stride_height, s.pad_height, s.out_height);
    const int64_t x = Conv2d::output(column, tap % s.kernel_width, s.stride_width, s.pad_width, s.out_width);
    return y < 0 || x < 0 ? -1 : (image * s.out_height + y) * s.out_width + x;
  };
  weight_gradient({c.words, s.batch * s.height * s.width, c.channels, c.columns, c.dy, c.dy_dtype,
                   s.kernel_height * s.kernel_width, c.dw, c.threads},
                  source);
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
