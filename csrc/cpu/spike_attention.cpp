// Compiled once per instruction set. A job is one head of one image: k^T v is counted by adding v's bits, as numbers, to the row
// of every set bit of k, and the rows that q's bits name are then summed. Counts are integers, so the result is exact.
#include "spike_attention.h"

#include "events.h"
#include "fire.h"
#include "pack.h"
#include "threads.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {
namespace {

// Rows of a head's matrices are padded to this many lanes.
constexpr int64_t kLanes = 16;
// A row beyond those of the widest head with a fixed number of lanes.
constexpr int64_t kSpare = 64;

int64_t lanes(int64_t width) { return ceil_div(width, kLanes) * kLanes; }

// Bits [first, first + width) of a row of words, 64 at a time.
struct HeadBits {
  const uint32_t* row;
  int64_t first, width;

  uint64_t chunk(int64_t at) const {
    const int64_t bit = first + at, left = width - at;
    const uint32_t* word = row + bit / 32;
    const int64_t shift = bit % 32, wanted = std::min<int64_t>(left, 64);
    uint64_t bits = word[0] >> shift;
    if (shift + wanted > 32) bits |= static_cast<uint64_t>(word[1]) << (32 - shift);
    if (shift + wanted > 64) bits |= static_cast<uint64_t>(word[2]) << (64 - shift);
    return wanted < 64 ? bits & ((uint64_t{1} << wanted) - 1) : bits;
  }

  template <typename Visit>
  void each(Visit visit) const {
    for (int64_t at = 0; at < width; at += 64)
      for (uint64_t bits = chunk(at); bits != 0; bits &= bits - 1) visit(at + __builtin_ctzll(bits));
  }

  // For heads of at most kSpare bits: in groups of four, the last filled with kSpare, so that few loops end unexpectedly.
  template <typename Visit>
  void each_of_four(Visit visit) const {
    uint64_t bits = chunk(0);
    do {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, bits &= bits - 1) visit(bits != 0 ? __builtin_ctzll(bits) : kSpare);
    } while (bits != 0);
  }

  // 0 or 1 for every bit, and zeros up to the padded width.
  template <typename T>
  void expand(T* out) const {
    using Lane = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
    constexpr int kCount = std::min<int>(16, kVector / sizeof(T));
    typedef Lane Lanes __attribute__((vector_size(kCount * sizeof(T))));
    typedef T Values __attribute__((vector_size(kCount * sizeof(T))));
    const Lanes ones = (Lanes)(Values{} + T(1));
    Lanes places;
    for (int i = 0; i < kCount; ++i) places[i] = static_cast<Lane>(1 << i);
    for (int64_t at = 0; at < width; at += 64) {
      const uint64_t bits = chunk(at);
      for (int64_t i = 0; i < std::min<int64_t>(64, lanes(width) - at); i += kCount) {
        const Lanes row = (Lanes)(((static_cast<Lane>(bits >> i) - Lanes{}) & places) != 0) & ones;
        memcpy(out + at + i, &row, sizeof row);
      }
    }
  }
};

// A fixed number of lanes keeps a row's sums in registers; 0 stands for any number.
template <int kFixed, typename T>
void add_row(T* sum, const T* row, int64_t count) {
  const int64_t n = kFixed != 0 ? kFixed : count;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += row[i];
}

// out[j] = the sum of the rows of `matrix` that the bits name; row kSpare holds zeros.
template <int kFixed, typename T>
void sum_rows(const HeadBits& bits, const T* matrix, int64_t count, T* out) {
  if constexpr (kFixed != 0) {
    T sum[kFixed] = {};
    bits.each_of_four([&](int64_t i) { add_row<kFixed>(sum, matrix + i * kFixed, kFixed); });
    memcpy(out, sum, sizeof sum);
  } else {
    std::fill(out, out + count, T(0));
    bits.each([&](int64_t i) { add_row<0>(out, matrix + i * count, count); });
  }
}

// Where the spikes of q, of k or of v are: rows of words, in each of them from bit `first` on.
struct Part {
  const uint32_t* rows;
  int64_t first;
};

struct Shape {
  int64_t row, stride, width, padded, matrix;  // of a row: spikes or gradients, and words
  Part q, k, v;
  explicit Shape(const SpikeAttention& c)
      : row(c.together ? 3 * c.channels : c.channels), stride(words_per_row(row)), width(c.channels / c.heads),
        padded(lanes(width)), matrix(std::max(width, kSpare + 1) * padded), q{c.q, 0}, k{c.k, c.together ? c.channels : 0},
        v{c.v, c.together ? 2 * c.channels : 0} {}

  HeadBits bits(const Part& part, int64_t token, int64_t head) const {
    return {part.rows + token * stride, part.first + head * width, width};
  }
};

// a^T b of one head, where a and b are k and v or the other way round: counts [width, padded], and zeros in row kSpare.
template <int kFixed, typename T>
void count_pairs(const SpikeAttention& c, const Shape& s, const Part& a, const Part& b, int64_t image, int64_t head, T* counts,
                 T* row) {
  std::fill(counts, counts + s.matrix, T(0));
  for (int64_t n = 0; n < c.k_tokens; ++n) {
    const int64_t token = image * c.k_tokens + n;
    const HeadBits rows = s.bits(a, token, head);
    s.bits(b, token, head).expand(row);
    const auto add = [&](int64_t i) { add_row<kFixed>(counts + i * s.padded, row, s.padded); };
    if constexpr (kFixed != 0)
      rows.each_of_four(add);
    else
      rows.each(add);
  }
  if constexpr (kFixed != 0) std::fill_n(counts + kSpare * kFixed, kFixed, T(0));
}

template <int kFixed, typename T>
void attend(const SpikeAttention& c) {
  const Shape s(c);
  const AlignedArray<T> scratch(c.threads * (s.matrix + 2 * s.padded));
  const AlignedArray<float> values(c.threads * s.padded);
  const bool stream = s.width % kLanes == 0 && may_stream(c.out, c.dtype, c.images * c.q_tokens, c.channels);
#pragma omp parallel for schedule(static) num_threads(c.threads) collapse(2)
  for (int64_t image = 0; image < c.images; ++image)
    for (int64_t head = 0; head < c.heads; ++head) {
      T* counts = scratch.data + thread_index() * (s.matrix + 2 * s.padded);
      T *row = counts + s.matrix, *sum = row + s.padded;
      float* buffer = values.data + thread_index() * s.padded;
      count_pairs<kFixed>(c, s, s.k, s.v, image, head, counts, row);
      for (int64_t n = 0; n < c.q_tokens; ++n) {
        const int64_t token = image * c.q_tokens + n;
        sum_rows<kFixed>(s.bits(s.q, token, head), counts, s.padded, sum);
        const int64_t at = token * c.channels + head * s.width;
        float* to = stream ? buffer : row_to_write(c.out, c.dtype, at, buffer);
#pragma omp simd
        for (int64_t j = 0; j < s.width; ++j) to[j] = static_cast<float>(sum[j]) * c.scale;
        if (stream) {
          stream_lines(static_cast<float*>(c.out) + at, buffer, s.width);
        } else {
          prefetch_row(c.out, c.dtype, at + s.width, head + 1 < c.heads ? s.width : 0);  // the next head's, meanwhile
          store_row(c.out, c.dtype, at, s.width, to);
        }
      }
    }
}

template <int kFixed>
void attend_by_counts(const SpikeAttention& c) {
  const int64_t largest = c.k_tokens * (c.channels / c.heads);
  return largest < (1 << 16) ? attend<kFixed, uint16_t>(c) : attend<kFixed, uint32_t>(c);
}

// A head of one image through all steps: its counts are currents that never leave the thread.
template <int kFixed, typename T, bool decay_input, bool soft_reset>
void attend_and_fire(const SpikeAttentionLif& c) {
  const SpikeAttention& f = c.forward;
  const Shape s(f);
  const int64_t batch = f.images / c.steps, halves = 2 * words_per_row(f.channels);
  const AlignedArray<T> scratch(f.threads * (s.matrix + 2 * s.padded));
  const AlignedArray<float> membranes(f.threads * f.q_tokens * kFixed);
#pragma omp parallel for schedule(static) num_threads(f.threads) collapse(2)
  for (int64_t image = 0; image < batch; ++image)
    for (int64_t head = 0; head < f.heads; ++head) {
      T* counts = scratch.data + thread_index() * (s.matrix + 2 * s.padded);
      T *row = counts + s.matrix, *sum = row + s.padded;
      float* v = membranes.data + thread_index() * f.q_tokens * kFixed;
      std::fill(v, v + f.q_tokens * kFixed, c.params.v_reset);
      for (int64_t t = 0; t < c.steps; ++t) {
        count_pairs<kFixed>(f, s, s.k, s.v, t * batch + image, head, counts, row);
        for (int64_t n = 0; n < f.q_tokens; ++n) {
          const int64_t token = (t * batch + image) * f.q_tokens + n;
          sum_rows<kFixed>(s.bits(s.q, token, head), counts, s.padded, sum);
          alignas(kLine) float current[kFixed];
#pragma omp simd
          for (int j = 0; j < kFixed; ++j) current[j] = static_cast<float>(sum[j]) * f.scale;
          const uint64_t bits = fire_row<kFixed, decay_input, soft_reset>(current, v + n * kFixed, c.params);
          auto* to = reinterpret_cast<uint16_t*>(c.words) + token * halves + head * (kFixed / 16);
          for (int i = 0; i < kFixed / 16; ++i) to[i] = static_cast<uint16_t>(bits >> (16 * i));
          if (head == f.heads - 1)
            for (int64_t i = f.channels / 16; i < halves; ++i) to[i - head * (kFixed / 16)] = 0;
        }
      }
    }
}

// Tokens whose rows are multiplied at a time, so that a matrix' row is loaded once for all and their sums stay in registers.
constexpr int64_t kTokens = 4;

// Vectors of a line whose sums, for kTokens rows, stay in registers.
constexpr int panel(int vectors) {
  const int most = kVector == 64 ? 4 : 3;
  return vectors <= most ? vectors : vectors % most == 0 ? most : 2;
}

// [kTokens, width] times [width, count], rows `count` apart.
template <int kFixed>
void multiply_rows(const float* rows, const float* matrix, int64_t width, int64_t count, float* out) {
  if constexpr (kFixed != 0) {
    constexpr int kFloats = kVector / 4, kLineVectors = kFixed / kFloats, kPanel = panel(kLineVectors);
    for (int first = 0; first < kLineVectors; first += kPanel) {
      FloatVector sums[kTokens][kPanel];
#pragma GCC unroll 4
      for (int n = 0; n < kTokens; ++n)
#pragma GCC unroll 4
        for (int p = 0; p < kPanel; ++p) sums[n][p] = FloatVector{};
      for (int64_t j = 0; j < width; ++j) {
        const auto* line = reinterpret_cast<const FloatVector*>(matrix + j * kFixed) + first;
#pragma GCC unroll 4
        for (int n = 0; n < kTokens; ++n) {
          const FloatVector value = rows[n * kFixed + j] - FloatVector{};
#pragma GCC unroll 4
          for (int p = 0; p < kPanel; ++p) sums[n][p] = fused(value, line[p], sums[n][p]);
        }
      }
#pragma GCC unroll 4
      for (int n = 0; n < kTokens; ++n) memcpy(out + n * kFixed + first * kFloats, sums[n], sizeof sums[n]);
    }
  } else {
    std::fill(out, out + kTokens * count, 0.0f);
    for (int64_t n = 0; n < kTokens; ++n)
      for (int64_t j = 0; j < width; ++j) {
        const float value = rows[n * count + j];
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) out[n * count + i] += value * matrix[j * count + i];
      }
  }
}

// With P = v^T k and G = q^T dy: dq = dy P, dk = v G^T, dv = k G.
template <int kFixed>
void differentiate(const SpikeAttentionGrad& c) {
  const SpikeAttention& f = c.forward;
  const Shape s(f);
  const int64_t each = 3 * s.matrix + (2 * kTokens + 1) * s.padded;
  const AlignedArray<float> scratch(f.threads * each);
  const bool stream = s.width % kLanes == 0 && may_stream(c.dq, f.dtype, f.images * f.q_tokens, f.channels) &&
                      may_stream(c.dk, f.dtype, f.images * f.k_tokens, f.channels) &&
                      may_stream(c.dv, f.dtype, f.images * f.k_tokens, f.channels);
#pragma omp parallel for schedule(static) num_threads(f.threads) collapse(2)
  for (int64_t image = 0; image < f.images; ++image)
    for (int64_t head = 0; head < f.heads; ++head) {
      float* counts = scratch.data + thread_index() * each;
      float *g = counts + s.matrix, *transposed = g + s.matrix;
      float *row = transposed + s.matrix, *sum = row + kTokens * s.padded, *buffer = sum + kTokens * s.padded;
      const int64_t next = head + 1 < f.heads ? s.width : 0;  // the next head's, to be fetched meanwhile
      const auto write = [&](const float* from, void* out, int64_t at) {
        if (stream) return stream_lines(static_cast<float*>(out) + at, from, s.width);
        prefetch_row(out, f.dtype, at + s.width, next);
        float* to = row_to_write(out, f.dtype, at, buffer);
        std::copy_n(from, s.width, to);
        store_row(out, f.dtype, at, s.width, to);
      };
      count_pairs<kFixed>(f, s, s.v, s.k, image, head, counts, row);
      std::fill(g, g + s.matrix, 0.0f);
      std::fill(row, row + kTokens * s.padded, 0.0f);
      for (int64_t first = 0; first < f.q_tokens; first += kTokens) {
        const int64_t tokens = std::min(kTokens, f.q_tokens - first);
        for (int64_t n = 0; n < tokens; ++n) {
          const int64_t token = image * f.q_tokens + first + n, at = token * f.channels + head * s.width;
          float* scaled = row + n * s.padded;
          const float* dy = load_row(f.out, f.dtype, at, s.width, buffer);
          prefetch_row(f.out, f.dtype, at + s.width, next);
#pragma omp simd
          for (int64_t j = 0; j < s.width; ++j) scaled[j] = dy[j] * f.scale;
          s.bits(s.q, token, head).each([&](int64_t i) { add_row<kFixed>(g + i * s.padded, scaled, s.padded); });
        }
        multiply_rows<kFixed>(row, counts, s.width, s.padded, sum);
        for (int64_t n = 0; n < tokens; ++n)
          write(sum + n * s.padded, c.dq, (image * f.q_tokens + first + n) * s.row + head * s.width);
      }
      std::fill(transposed, transposed + s.matrix, 0.0f);
      for (int64_t j = 0; j < s.width; ++j)
#pragma omp simd
        for (int64_t i = 0; i < s.width; ++i) transposed[j * s.padded + i] = g[i * s.padded + j];
      for (int64_t n = 0; n < f.k_tokens; ++n) {
        const int64_t token = image * f.k_tokens + n, at = token * s.row + head * s.width;
        sum_rows<kFixed>(s.bits(s.k, token, head), g, s.padded, sum);
        write(sum, c.dv, at);
        sum_rows<kFixed>(s.bits(s.v, token, head), transposed, s.padded, sum);
        write(sum, c.dk, at);
      }
    }
}

// Calls `f` with the padded width of a head as a constant where it is a common one.
template <typename F>
void by_width(const SpikeAttention& c, F f) {
  switch (lanes(c.channels / c.heads)) {
    case 16: return f(std::integral_constant<int, 16>());
    case 32: return f(std::integral_constant<int, 32>());
    case 48: return f(std::integral_constant<int, 48>());
    case 64: return f(std::integral_constant<int, 64>());
    default: return f(std::integral_constant<int, 0>());
  }
}

}  // namespace

void spike_attention(const SpikeAttention& c) {
  by_width(c, [&](auto width) { attend_by_counts<width.value>(c); });
}

void spike_attention_lif(const SpikeAttentionLif& c) {
  by_width(c.forward, [&](auto width) {
    if constexpr (width.value != 0)
      by_flags(c.params.decay_input, c.params.soft_reset, [&](auto decay_input, auto soft_reset) {
        constexpr bool decay = decltype(decay_input)::value, soft = decltype(soft_reset)::value;
        if (c.forward.k_tokens * width.value < (1 << 16))
          attend_and_fire<width.value, uint16_t, decay, soft>(c);
        else
          attend_and_fire<width.value, uint32_t, decay, soft>(c);
      });
  });
}

void spike_attention_grad(const SpikeAttentionGrad& c) {
  by_width(c.forward, [&](auto width) { differentiate<width.value>(c); });
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
