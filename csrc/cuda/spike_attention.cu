// Sums of products of spikes are counts of bits, exact in any order: k^T v by population counts of rows turned to columns, and
// what they are multiplied with by additions where a spike is. A block owns one head of one sequence.
#include "spike_attention.cuh"

#include "values.cuh"

namespace spikeclip {
namespace {

constexpr int kThreads = 128, kRows = 64, kColumns = 64, kWarps = kThreads / 32;
constexpr int kOwn = kRows / kWarps;  // rows of a warp, whose lanes own columns lane and lane + 32
constexpr int kTokens = 8;            // words of tokens turned at a time

// Word j of a head's bits in a packed row.
__device__ __forceinline__ uint32_t head_word(const uint32_t* row, int per_row, int start, int j, int width) {
  const int left = width - 32 * j;
  if (left <= 0) return 0;
  const int word = (start + 32 * j) / 32, shift = start % 32;
  const uint32_t high = word + 1 < per_row ? row[word + 1] : 0;
  const uint32_t bits = static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | row[word]) >> shift);
  return left >= 32 ? bits : bits & ((1u << left) - 1);
}

// One head of one sequence: where its rows begin, and its first channel.
struct Head {
  int64_t sequence;
  int start, width, channels;

  __device__ __forceinline__ uint32_t word(const Spikes& s, int rows, int row, int j) const {
    if (row >= rows) return 0;
    return head_word(s.words + (sequence * rows + row) * s.per_row, s.per_row, s.first + start, j, width);
  }
  __device__ __forceinline__ int64_t at(int rows, int row, int column) const {
    return (sequence * rows + row) * channels + start + column;
  }
};

__device__ __forceinline__ Head head(const Heads& size) {
  const int channels = size.heads * size.width;
  return {static_cast<int64_t>(blockIdx.x / size.heads), static_cast<int>(blockIdx.x % size.heads) * size.width, size.width,
          channels};
}

// counts [32][kColumns] = k^T v for word i of k and words j, j + 1 of v.
__device__ __forceinline__ void count_pairs(const Head& h, const Spikes& k, const Spikes& v, int s, int i, int j,
                                            float (&counts)[32][kColumns]) {
  __shared__ uint32_t turned[3 * 32][kTokens + 1];  // bit b of a line is token b
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int e = threadIdx.x; e < 32 * kColumns; e += kThreads) counts[e / kColumns][e % kColumns] = 0.0f;
  for (int start = 0; start < s; start += 32 * kTokens) {
    __syncthreads();
    for (int part = warp; part < 3 * kTokens; part += kWarps) {
      const int token = start + part / 3 * 32 + lane, which = part % 3;
      const uint32_t word = which == 0 ? h.word(k, s, token, i) : h.word(v, s, token, j + which - 1);
      uint32_t mine = 0;
#pragma unroll
      for (int bit = 0; bit < 32; ++bit) {
        const uint32_t column = __ballot_sync(0xffffffffu, word >> bit & 1);
        if (lane == bit) mine = column;
      }
      turned[which * 32 + lane][part / 3] = mine;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < 32 * kColumns; e += kThreads) {
      const int row = e / kColumns, column = e % kColumns;
      int count = 0;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) count += __popc(turned[row][t] & turned[32 + column][t]);
      counts[row][column] += static_cast<float>(count);
    }
  }
  __syncthreads();
}

__device__ __forceinline__ void store_rows(const Head& h, const float (&sums)[kOwn][2], int row0, int rows, int column0, void* y,
                                           int y_row, Dtype dtype, float scale) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < kOwn; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + r, column = column0 + 32 * half + lane;
      const int64_t at = (h.sequence * rows + row) * y_row + h.start + column;
      if (row < rows && column < h.width) store_value(y, dtype, at, sums[r][half] * scale);
    }
}

// sums += the lines of `tile` that the bits of the warp's rows name; a lane holds the word of row `lane`.
__device__ __forceinline__ void add_named(float (&sums)[kOwn][2], uint32_t words, const float (&tile)[32][kColumns]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < kOwn; ++r)
    for (uint32_t left = __shfl_sync(0xffffffffu, words, r); left != 0; left &= left - 1) {
      const float* line = tile[__ffs(left) - 1];
      sums[r][0] += line[lane], sums[r][1] += line[lane + 32];
    }
}

// q (k^T v).
__global__ void __launch_bounds__(kThreads) attend(SpikeAttention c) {
  __shared__ float counts[32][kColumns];
  const Head h = head(c.size);
  const int tiles = (h.width + kColumns - 1) / kColumns, column0 = blockIdx.y % tiles * kColumns;
  const int row0 = blockIdx.y / tiles * kRows + threadIdx.x / 32 * kOwn, lane = threadIdx.x % 32;
  float sums[kOwn][2] = {};
  for (int i = 0; 32 * i < h.width; ++i) {
    __syncthreads();
    count_pairs(h, c.k, c.v, c.s, i, column0 / 32, counts);
    add_named(sums, lane < kOwn ? h.word(c.q, c.n, row0 + lane, i) : 0, counts);
  }
  store_rows(h, sums, row0, c.n, column0, c.y, h.channels, c.y_dtype, c.scale);
}

// (q k^T) v, 32 tokens of k and v at a time.
__global__ void __launch_bounds__(kThreads) attend_direct(SpikeAttention c) {
  __shared__ float scores[kRows][33];
  const Head h = head(c.size);
  const int tiles = (h.width + kColumns - 1) / kColumns, column0 = blockIdx.y % tiles * kColumns;
  const int block0 = blockIdx.y / tiles * kRows, own0 = threadIdx.x / 32 * kOwn, lane = threadIdx.x % 32;
  float sums[kOwn][2] = {};
  for (int token0 = 0; token0 < c.s; token0 += 32) {
    __syncthreads();
    for (int r = own0; r < own0 + kOwn; ++r) {
      int score = 0;
      for (int i = 0; 32 * i < h.width; ++i)
        score += __popc(h.word(c.q, c.n, block0 + r, i) & h.word(c.k, c.s, token0 + lane, i));
      scores[r][lane] = static_cast<float>(score);
    }
    __syncthreads();
    for (int token = 0; token < 32; ++token) {
      const uint32_t left = h.word(c.v, c.s, token0 + token, column0 / 32) >> lane & 1;
      const uint32_t right = h.word(c.v, c.s, token0 + token, column0 / 32 + 1) >> lane & 1;
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        const float score = scores[own0 + r][token];
        if (left) sums[r][0] += score;
        if (right) sums[r][1] += score;
      }
    }
  }
  store_rows(h, sums, block0 + own0, c.n, column0, c.y, h.channels, c.y_dtype, c.scale);
}

__global__ void __launch_bounds__(kThreads) gram_packed(HeadGram c) {
  __shared__ float counts[32][kColumns];
  const Head h = head(c.size);
  const int tiles = (h.width + kColumns - 1) / kColumns, column0 = blockIdx.y % tiles * kColumns, i = blockIdx.y / tiles;
  count_pairs(h, c.a, c.b, c.rows, i, column0 / 32, counts);
  float* gram = c.gram + static_cast<int64_t>(blockIdx.x) * h.width * h.width;
  for (int e = threadIdx.x; e < 32 * kColumns; e += kThreads) {
    const int row = 32 * i + e / kColumns, column = column0 + e % kColumns;
    if (row < h.width && column < h.width) gram[static_cast<int64_t>(row) * h.width + column] = counts[e / kColumns][e % kColumns];
  }
}

// A thread owns 4 of 32 lines and 4 columns.
template <typename B>
__global__ void __launch_bounds__(kThreads) gram_dense(HeadGram c) {
  __shared__ uint32_t words[32];
  alignas(16) __shared__ float tile[32][kColumns];
  const Head h = head(c.size);
  const int tiles = (h.width + kColumns - 1) / kColumns, column0 = blockIdx.y % tiles * kColumns, i = blockIdx.y / tiles;
  const int line = threadIdx.x / 16 * 4, part = threadIdx.x % 16 * 4;
  float sums[4][4] = {};
  for (int row0 = 0; row0 < c.rows; row0 += 32) {
    __syncthreads();
    if (threadIdx.x < 32) words[threadIdx.x] = h.word(c.a, c.rows, row0 + threadIdx.x, i);
    for (int e = threadIdx.x; e < 32 * kColumns; e += kThreads) {
      const int row = row0 + e / kColumns, column = column0 + e % kColumns;
      const bool inside = row < c.rows && column < h.width;
      tile[e / kColumns][e % kColumns] = inside ? to_float(static_cast<const B*>(c.dense)[h.at(c.rows, row, column)]) : 0.0f;
    }
    __syncthreads();
#pragma unroll 4
    for (int row = 0; row < 32; ++row) {
      const uint32_t bits = words[row] >> line;
#pragma unroll
      for (int a = 0; a < 4; ++a)
#pragma unroll
        for (int b = 0; b < 4; ++b)
          if (bits >> a & 1) sums[a][b] += tile[row][part + b];
    }
  }
  float* gram = c.gram + static_cast<int64_t>(blockIdx.x) * h.width * h.width;
#pragma unroll
  for (int a = 0; a < 4; ++a)
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int row = 32 * i + line + a, column = column0 + part + b;
      if (row < h.width && column < h.width) gram[static_cast<int64_t>(row) * h.width + column] = sums[a][b];
    }
}

// tile [32][kColumns] = lines 32 i.. and columns column0.. of a head's gram, or of its transpose.
__device__ __forceinline__ void load_gram(const HeadApply& c, const Head& h, int i, int column0, float (&tile)[32][kColumns]) {
  const float* gram = c.gram + static_cast<int64_t>(blockIdx.x) * h.width * h.width;
  for (int e = threadIdx.x; e < 32 * kColumns; e += kThreads) {
    const int line = c.transposed ? e % 32 : e / kColumns, column = c.transposed ? e / 32 : e % kColumns;
    const int64_t row = 32 * i + line, at = column0 + column;
    const bool inside = row < h.width && at < h.width;
    tile[line][column] = inside ? gram[c.transposed ? at * h.width + row : row * h.width + at] : 0.0f;
  }
}

__global__ void __launch_bounds__(kThreads) apply_packed(HeadApply c) {
  __shared__ float tile[32][kColumns];
  const Head h = head(c.size);
  const int tiles = (h.width + kColumns - 1) / kColumns, column0 = blockIdx.y % tiles * kColumns;
  const int row0 = blockIdx.y / tiles * kRows + threadIdx.x / 32 * kOwn, lane = threadIdx.x % 32;
  float sums[kOwn][2] = {};
  for (int i = 0; 32 * i < h.width; ++i) {
    __syncthreads();
    load_gram(c, h, i, column0, tile);
    __syncthreads();
    add_named(sums, lane < kOwn ? h.word(c.a, c.rows, row0 + lane, i) : 0, tile);
  }
  store_rows(h, sums, row0, c.rows, column0, c.y, c.y_row, c.y_dtype, c.scale);
}

template <typename A>
__global__ void __launch_bounds__(kThreads) apply_dense(HeadApply c) {
  __shared__ float tile[32][kColumns];
  const Head h = head(c.size);
  const int tiles = (h.width + kColumns - 1) / kColumns, column0 = blockIdx.y % tiles * kColumns;
  const int row0 = blockIdx.y / tiles * kRows + threadIdx.x / 32 * kOwn, lane = threadIdx.x % 32;
  float sums[kOwn][2] = {};
  for (int i = 0; 32 * i < h.width; ++i) {
    __syncthreads();
    load_gram(c, h, i, column0, tile);
    __syncthreads();
    float mine[kOwn];
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const bool inside = row0 + r < c.rows && 32 * i + lane < h.width;
      mine[r] = inside ? to_float(static_cast<const A*>(c.dense)[h.at(c.rows, row0 + r, 32 * i + lane)]) : 0.0f;
    }
#pragma unroll 4
    for (int line = 0; line < 32; ++line) {
      const float left = tile[line][lane], right = tile[line][lane + 32];
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        const float value = __shfl_sync(0xffffffffu, mine[r], line);
        sums[r][0] = fmaf(value, left, sums[r][0]);
        sums[r][1] = fmaf(value, right, sums[r][1]);
      }
    }
  }
  store_rows(h, sums, row0, c.rows, column0, c.y, c.y_row, c.y_dtype, c.scale);
}

dim3 grid(const Heads& size, int64_t parts) {
  return dim3(static_cast<unsigned>(size.sequences * size.heads), static_cast<unsigned>(parts * ceil_div(size.width, kColumns)));
}

}  // namespace

void spike_attention(const SpikeAttention& c, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const dim3 blocks = grid(c.size, ceil_div(c.n, kRows));
  if (c.s < c.size.width)
    attend_direct<<<blocks, kThreads, 0, on>>>(c);
  else
    attend<<<blocks, kThreads, 0, on>>>(c);
  check(cudaGetLastError());
}

void head_gram(const HeadGram& c, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const dim3 blocks = grid(c.size, ceil_div(c.size.width, 32));
  if (c.dense == nullptr)
    gram_packed<<<blocks, kThreads, 0, on>>>(c);
  else if (c.dense_dtype == Dtype::f32)
    gram_dense<float><<<blocks, kThreads, 0, on>>>(c);
  else if (c.dense_dtype == Dtype::f16)
    gram_dense<__half><<<blocks, kThreads, 0, on>>>(c);
  else
    gram_dense<__nv_bfloat16><<<blocks, kThreads, 0, on>>>(c);
  check(cudaGetLastError());
}

void head_apply(const HeadApply& c, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const dim3 blocks = grid(c.size, ceil_div(c.rows, kRows));
  if (c.dense == nullptr)
    apply_packed<<<blocks, kThreads, 0, on>>>(c);
  else if (c.dense_dtype == Dtype::f32)
    apply_dense<float><<<blocks, kThreads, 0, on>>>(c);
  else if (c.dense_dtype == Dtype::f16)
    apply_dense<__half><<<blocks, kThreads, 0, on>>>(c);
  else
    apply_dense<__nv_bfloat16><<<blocks, kThreads, 0, on>>>(c);
  check(cudaGetLastError());
}

}  // namespace spikeclip
