// Packed rows as lists of the lines to add, and the walk over tiles that adds them.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "convert.h"
#include "lines.h"
#include "pack.h"
#include "spike_matmul.h"
#include "switches.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {

// Line offsets of the set bits of every byte value, relative to the byte's first bit.
struct ByteTable {
  alignas(16) uint16_t offsets[256][8];
  uint8_t count[256];
  constexpr ByteTable() : offsets(), count() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0; bit < 8; ++bit)
        if (byte >> bit & 1) offsets[byte][count[byte]++] = static_cast<uint16_t>(bit * kLineUnits);
  }
};
inline constexpr ByteTable kBytes;

typedef uint16_t EightShorts __attribute__((vector_size(16), may_alias, aligned(2)));

template <typename T>
struct AlignedArray {
  T* data;
  explicit AlignedArray(int64_t count)
      : data(static_cast<T*>(::operator new(static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T), std::align_val_t(kLine)))) {}
  AlignedArray(const AlignedArray&) = delete;
  AlignedArray& operator=(const AlignedArray&) = delete;
  ~AlignedArray() { ::operator delete(data, std::align_val_t(kLine)); }
};

// `count` floats, or zeros where there are none, padded with zeros.
struct Padded : AlignedArray<float> {
  Padded(const float* from, int64_t count, int64_t padded) : AlignedArray(padded) {
    std::fill(data, data + padded, 0.0f);
    if (from != nullptr) std::copy(from, from + count, data);
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if defined(__AVX512BW__)
struct FirstLines {
  alignas(kLine) uint16_t offsets[32];
  constexpr FirstLines() : offsets() {
    for (int bit = 0; bit < 32; ++bit) offsets[bit] = static_cast<uint16_t>(bit * kLineUnits);
  }
};
inline constexpr FirstLines kFirstLines;

// 32 bits at once, where the machine packs 16-bit lanes by a mask.
__attribute__((target("avx512vbmi2"))) inline int64_t decode_words(const uint8_t* row, int64_t bytes, uint16_t first,
                                                                   uint16_t* list) {
  __m512i offsets = _mm512_add_epi16(_mm512_load_si512(kFirstLines.offsets), _mm512_set1_epi16(static_cast<int16_t>(first)));
  int64_t count = 0;
  const auto append = [&](uint32_t bits) __attribute__((target("avx512vbmi2"))) {
    _mm512_storeu_si512(list + count, _mm512_maskz_compress_epi16(bits, offsets));
    count += __builtin_popcount(bits);
    offsets = _mm512_add_epi16(offsets, _mm512_set1_epi16(32 * kLineUnits));
  };
  uint32_t bits;
  for (; bytes >= 4; row += 4, bytes -= 4) {
    memcpy(&bits, row, 4);
    append(bits);
  }
  bits = 0;
  for (int64_t b = 0; b < bytes; ++b) bits |= uint32_t{row[b]} << 8 * b;
  if (bytes > 0) append(bits);
  return count;
}
#endif

// The line offsets of the bits of one row, whose first is `first`; returns how many there are.
inline int64_t decode_bits(const uint8_t* row, int64_t bytes, uint16_t first, uint16_t* list) {
#if defined(__AVX512BW__)
  if (__builtin_cpu_supports("avx512vbmi2")) return decode_words(row, bytes, first, list);
#endif
  EightShorts base = EightShorts{} + first;
  int64_t count = 0;
  for (int64_t b = 0; b < bytes; ++b) {
    *reinterpret_cast<EightShorts*>(list + count) = *reinterpret_cast<const EightShorts*>(kBytes.offsets[row[b]]) + base;
    count += kBytes.count[row[b]];
    base += 8 * kLineUnits;
  }
  return count;
}

// Elements that may be written beyond a list's end.
constexpr int64_t kSpill = 32;

// Scratch that a thread keeps from call to call.
template <typename Slot, typename T>
T* kept(int64_t count) {
  thread_local std::unique_ptr<AlignedArray<T>> array;
  thread_local int64_t size = 0;
  if (array == nullptr || count > size) {
    array.reset();
    array = std::make_unique<AlignedArray<T>>(count);
    size = count;
  }
  return array->data;
}

// Lines of a span that 16 bits name.
constexpr int64_t kMostLines = (1 << 16) / kLineUnits;

// Sparse rows take several blocks at once: to begin and end a list costs as much as to add some ten lines, and more than it costs
// that the lines of several blocks do not all stay in the first-level cache. The density is that of the whole input: on it, and
// so in their last bits on other rows, float32 sums depend, on the number of threads they do not. Sums of int16 fit 16 bits for
// one block alone.
template <typename Source>
std::vector<Span> spans_of(const Tiles& tiles, const Source& source) {
  const bool several = tiles.blocks() > 1 && tiles.kind != WeightKind::i16;
  const double density = several ? source.density() : 0, most_events = tiles.kind == WeightKind::i8 ? 160 : 96;  // measured
  std::vector<Span> spans;
  for (int64_t first = 0, end; first < tiles.blocks(); first = end) {
    for (end = first + 1; several && end < tiles.blocks(); ++end) {
      const int64_t lines = tiles.lines({first, end + 1});
      if (lines > kMostLines || static_cast<double>(lines) * density > most_events) break;
    }
    spans.push_back({first, end});
  }
  return spans;
}

struct Nothing {
  void operator()() const {}
};

// Lists of `rows` rows over one span of at most `depth` inputs. Every list is padded to whole groups of four with the line of
// zeros that ends the span's own lines.
struct Lists {
  uint16_t* offsets;  // capacity(rows, depth)
  int32_t* start;     // [rows + 1], in groups
  int32_t* events;    // [rows], without the padding

  static int64_t capacity(int64_t rows, int64_t depth) { return rows * (depth + 4) + kSpill; }

  Lists from(int64_t row) const { return {offsets, start + row, events + row}; }

  // The sum of the lines that row r names.
  template <typename Kind>
  Sums<Kind> sum(const char* tile, int64_t r) const {
    return Kind::sum(tile, offsets + int64_t{4} * start[r], start[r + 1] - start[r], events[r]);
  }

  // `write(r, list)` writes the offsets of row r's lines and returns how many there are.
  template <typename Write>
  void fill(int64_t rows, uint16_t zeros, Write write) {
    int32_t groups = 0;
    for (int64_t r = 0; r < rows; ++r) {
      uint16_t* list = offsets + int64_t{4} * groups;
      const int64_t count = write(r, list);
      for (int i = 0; i < 4; ++i) list[count + i] = zeros;
      start[r] = groups;
      events[r] = static_cast<int32_t>(count);
      groups += static_cast<int32_t>((count + 3) / 4);
    }
    start[rows] = groups;
  }
};

struct OffsetsSlot;
struct StartsSlot;

// Decodes panels of rows into lists [panels, spans], which lie in this thread's memory until its next call.
template <typename Panel, typename Meanwhile = Nothing>
void decode_all(const Tiles& tiles, const std::vector<Panel>& panels, const std::vector<Span>& spans, Lists* to,
                Meanwhile meanwhile = {}) {
  const int64_t number = static_cast<int64_t>(spans.size());
  int64_t events = 0, rows = 0;
  for (const Panel& panel : panels) events += panel.events(), rows += panel.count;
  uint16_t* offsets = kept<OffsetsSlot, uint16_t>(events + 4 * rows * number + kSpill);
  int32_t* starts = kept<StartsSlot, int32_t>((2 * rows + static_cast<int64_t>(panels.size())) * number);
  for (const Panel& panel : panels)
    for (const Span& span : spans) {
      *to = {offsets, starts, starts + panel.count + 1};
      panel.decode(tiles, span, *to, meanwhile);
      offsets += int64_t{4} * to->start[panel.count];
      starts += 2 * panel.count + 1;
      ++to;
    }
}

// A row's sums as float32, scaled (integers) and biased; `scale` and `bias` are aligned.
template <typename Kind>
void finish(const Sums<Kind>& sums, const float* scale, const float* bias, float* values) {
  sums.each([&](int n) {
    const int at = kLanes * n;
    FloatVector value = __builtin_convertvector(sums.parts[n], FloatVector);
    if constexpr (!std::is_same_v<typename Kind::Wide, float>) value *= *reinterpret_cast<const FloatVector*>(scale + at);
    *reinterpret_cast<LooseFloats*>(values + at) = value + *reinterpret_cast<const FloatVector*>(bias + at);
  });
}

// What becomes of a row's finished sums: scaled (integers), biased, rounded to the output's type.
struct Output {
  void* data;
  Dtype dtype;
  int64_t columns;
  const float* scale;       // padded to whole lines; unused for float32 weights
  const float* bias;        // padded to whole lines
  bool stream;              // whole lines past the caches

  template <typename Kind>
  void write(int64_t row, int64_t column, const Sums<Kind>& sums) const {
    alignas(kLine) float values[Kind::kColumns];
    finish<Kind>(sums, scale + column, bias + column, values);
    const int64_t here = row * columns + column, width = std::min<int64_t>(Kind::kColumns, columns - column);
    if (dtype == Dtype::f32)
      memcpy(static_cast<float*>(data) + here, values, static_cast<size_t>(width) * 4);
    else if (width == Kind::kColumns)  // a loop of known length
      store_row(data, dtype, here, Kind::kColumns, values);
    else
      store_row(data, dtype, here, width, values);
  }
};

constexpr int64_t kFew = 4;

// Add one span's lines to the sums of `rows` rows in `from` (null: zeros). The new ones go to `to`, or, where that is null, row
// m's to `done(m, sums)`. `meanwhile()` is called before every kFew rows.
template <typename Kind, typename Done, typename Meanwhile = Nothing>
void add_lines(const char* tile, Lists lists, int64_t rows, const typename Kind::Wide* from, typename Kind::Wide* to, Done done,
               Meanwhile meanwhile = {}) {
  using Vector = typename Kind::Vector;
  by_flags(from != nullptr, to != nullptr, [&](auto begun, auto more) {
    for (int64_t m = 0; m < rows; ++m) {
      if (m % kFew == 0) meanwhile();
      Sums<Kind> sum = lists.template sum<Kind>(tile, m);
      if constexpr (begun) sum.add(reinterpret_cast<const Vector*>(from + m * Kind::kColumns));
      if constexpr (more)
        sum.keep(reinterpret_cast<Vector*>(to + m * Kind::kColumns));
      else
        done(m, sum);
    }
  });
}

// The same, with rows from `row` on of an output for the sums of a last span, in columns from `column` on.
template <typename Kind>
void add_lines(const char* tile, const Lists& lists, int64_t rows, const typename Kind::Wide* from, typename Kind::Wide* to,
               const Output& out, int64_t row, int64_t column) {
  const float *scale = out.scale + column, *bias = out.bias + column;
  const int64_t columns = out.columns;
  float* values = static_cast<float*>(out.data) + row * columns + column;
  if (out.dtype != Dtype::f32 || column + Kind::kColumns > columns)
    add_lines<Kind>(tile, lists, rows, from, to, [&](int64_t m, const auto& sum) { out.write<Kind>(row + m, column, sum); });
  else if (out.stream)
    add_lines<Kind>(tile, lists, rows, from, to, [=](int64_t m, const auto& sum) {
      alignas(kLine) float line[Kind::kColumns];
      finish<Kind>(sum, scale, bias, line);
      stream_lines(values + m * columns, line, Kind::kColumns);
    });
  else
    add_lines<Kind>(tile, lists, rows, from, to,
                    [=](int64_t m, const auto& sum) { finish<Kind>(sum, scale, bias, values + m * columns); });
}

// The share of ones among `rows` rows of `length` spikes.
inline double density_of(const uint32_t* words, int64_t rows, int64_t length) {
  return static_cast<double>(count(words, rows * words_per_row(length))) / static_cast<double>(std::max<int64_t>(rows * length, 1));
}

// Where packed rows come from: memory, as they are. A source gives rows of bits, or a panel of rows that becomes lists.
struct PackedRows {
  const uint32_t* words;
  int64_t number, length;

  int64_t stride() const { return words_per_row(length); }
  double density() const { return density_of(words, number, length); }
  int64_t scratch(int64_t) const { return 0; }
  const uint32_t* rows(int64_t first, int64_t, uint32_t*) const { return words + first * stride(); }

  struct Panel {
    const uint32_t* first;
    int64_t stride, count;

    // At least as many events as all lists hold together.
    int64_t events() const { return SPIKECLIP_ISA::count(first, count * stride); }
    // `meanwhile()` is called once a row.
    template <typename Meanwhile = Nothing>
    void decode(const Tiles& tiles, Span span, Lists& lists, Meanwhile meanwhile = {}) const {
      struct Part {
        const uint8_t* bits;  // of the first row
        int64_t bytes;
        uint16_t line;
      };
      std::vector<Part> parts;
      for (int64_t block = span.first; block < span.end; ++block)
        parts.push_back({reinterpret_cast<const uint8_t*>(first) + tiles.block_start(block) / 8,
                         ceil_div(tiles.block_length(block), 8), tiles.line(span, block)});
      lists.fill(count, tiles.zeros(span), [&](int64_t r, uint16_t* list) {
        meanwhile();
        int64_t length = 0;
        for (const Part& part : parts)
          length += decode_bits(part.bits + 4 * stride * r, part.bytes, part.line, list + length);
        return length;
      });
    }
  };
  Panel panel(const Tiles&, int64_t first, int64_t count) const { return {words + first * stride(), stride(), count}; }
};

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
