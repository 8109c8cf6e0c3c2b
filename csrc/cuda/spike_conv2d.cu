// Implicit products: rows are output pixels, a tap of the kernel names the input pixel of each. Spikes are expanded in
// registers, for tensor cores where the operand has 16 bits, else for predicated additions; 32 inputs that hold no spike for
// a whole block are passed over.
#include "spike_conv2d.cuh"

#include "mma.cuh"
#include "values.cuh"

namespace spikeclip {
namespace {

constexpr int kThreads = 128, kRows = 64, kStep = 32;
constexpr int kWide = 64;         // columns of a block that adds, and of every gradient
constexpr int kPad = kStep + 8;   // shared lines this far apart fall into different banks
constexpr int kPrograms = 256;    // about two for each multiprocessor of a large GPU
constexpr int kSplitRows = 1024;  // at least, of a gradient

struct Pixel {
  int image, line, column;
};

__device__ __forceinline__ Pixel place(const ConvShape& s, int row) {
  const int line = row / s.out_width, image = line / s.out_height;
  return {image, line - image * s.out_height, row - line * s.out_width};
}

// Index of the input pixel that a tap of an output pixel reads, or -1 outside the image.
__device__ __forceinline__ int64_t source(const ConvShape& s, const Pixel& p, int tap) {
  const int y = p.line * s.stride_h - s.pad_h + tap / s.kernel_width, x = p.column * s.stride_w - s.pad_w + tap % s.kernel_width;
  if (y < 0 || y >= s.height || x < 0 || x >= s.width) return -1;
  return (static_cast<int64_t>(p.image) * s.height + y) * s.width + x;
}

// Adds `row[j]` to sums[i][j] where bit i of a row's `spikes` is set.
__device__ __forceinline__ void add_where(float (&sums)[4], bool spike, const float* row) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (spike) sums[j] += row[j];
}

__device__ __forceinline__ void store(const SpikeProduct& c, int row, int column, float sum) {
  if (row >= c.m || column >= c.n) return;
  if (c.scale != nullptr) sum *= c.scale[column];
  if (c.bias != nullptr) sum += c.bias[column];
  store_value(c.y, c.y_dtype, static_cast<int64_t>(row) * c.n + column, sum);
}

template <typename W>
__device__ __forceinline__ float weight(const SpikeProduct& c, int tap, int k, int column) {
  if (k >= c.channels || column >= c.n) return 0.0f;
  return to_float(static_cast<const W*>(c.w)[tap * c.stride_tap + k * c.stride_k + column * c.stride_n]);
}

// Calls add(word index, words[kOwn] of the caller's rows) for every tap and 32 inputs in which the block has a spike.
template <int kOwn, typename Load, typename Add>
__device__ __forceinline__ void each_step(const SpikeProduct& c, const int (&rows)[kOwn], Load load, Add add) {
  const int per_row = (c.channels + 31) / 32;
  Pixel pixels[kOwn];
#pragma unroll
  for (int r = 0; r < kOwn; ++r) pixels[r] = place(c.shape, rows[r]);
  for (int tap = 0; tap < c.shape.taps; ++tap) {
    const uint32_t* at[kOwn];
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const int64_t pixel = rows[r] < c.m ? source(c.shape, pixels[r], tap) : -1;
      at[r] = pixel < 0 ? nullptr : c.words + pixel * per_row;
    }
    for (int word = 0; word < per_row; ++word) {
      uint32_t words[kOwn], any = 0;
#pragma unroll
      for (int r = 0; r < kOwn; ++r) any |= words[r] = at[r] == nullptr ? 0 : at[r][word];
      if (!__syncthreads_or(any != 0)) continue;  // also: every thread is done with the last tile
      load(tap, word * 32);
      __syncthreads();
      add(words);
    }
  }
}

template <typename T, typename W, int kColumns>
__global__ void __launch_bounds__(kThreads) product_mma(SpikeProduct c) {
  alignas(16) __shared__ T tile[kColumns][kPad];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int tiles = (c.n + kColumns - 1) / kColumns, column0 = blockIdx.x % tiles * kColumns;
  const int row0 = blockIdx.x / tiles * kRows + warp / 2 * 32 + g, part = warp % 2 * (kColumns / 2);
  const int rows[4] = {row0, row0 + 8, row0 + 16, row0 + 24};
  float sums[2][kColumns / 16][4] = {};

  each_step(
      c, rows,
      [&](int tap, int k0) {
        for (int e = threadIdx.x; e < kStep * kColumns; e += kThreads) {
          const int k = c.stride_k == 1 ? e % kStep : e / kColumns, n = c.stride_k == 1 ? e / kStep : e % kColumns;
          tile[n][k] = from_float<T>(weight<W>(c, tap, k0 + k, column0 + n));
        }
      },
      [&](const uint32_t(&words)[4]) {
#pragma unroll
        for (int k = 2 * t; k < kStep; k += 16) {
          uint32_t a[2][4];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t upper = words[2 * i] >> k, lower = words[2 * i + 1] >> k;
            a[i][0] = spike_pair<T>(upper, upper >> 1), a[i][1] = spike_pair<T>(lower, lower >> 1);
            a[i][2] = spike_pair<T>(upper >> 8, upper >> 9), a[i][3] = spike_pair<T>(lower >> 8, lower >> 9);
          }
#pragma unroll
          for (int j = 0; j < kColumns / 16; ++j) {
            const T* line = &tile[part + 8 * j + g][k];
            const uint32_t b[2] = {*reinterpret_cast<const uint32_t*>(line), *reinterpret_cast<const uint32_t*>(line + 8)};
            mma<T>(sums[0][j], a[0], b);
            mma<T>(sums[1][j], a[1], b);
          }
        }
      });

#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) store(c, rows[2 * i + e / 2], column0 + part + 8 * j + 2 * t + e % 2, sums[i][j][e]);
}

// A thread owns 8 rows and 4 columns.
template <typename W>
__global__ void __launch_bounds__(kThreads) product_add(SpikeProduct c) {
  alignas(16) __shared__ float tile[kStep][kWide];
  const int tiles = (c.n + kWide - 1) / kWide, column0 = blockIdx.x % tiles * kWide;
  const int row0 = blockIdx.x / tiles * kRows + threadIdx.x / 16 * 8, part = threadIdx.x % 16 * 4;
  int rows[8];
#pragma unroll
  for (int r = 0; r < 8; ++r) rows[r] = row0 + r;
  float sums[8][4] = {};

  each_step(
      c, rows,
      [&](int tap, int k0) {
        for (int e = threadIdx.x; e < kStep * kWide; e += kThreads) {
          const int k = c.stride_k == 1 ? e % kStep : e / kWide, n = c.stride_k == 1 ? e / kStep : e % kWide;
          tile[k][n] = weight<W>(c, tap, k0 + k, column0 + n);
        }
      },
      [&](const uint32_t(&words)[8]) {
#pragma unroll
        for (int k = 0; k < kStep; ++k)
#pragma unroll
          for (int r = 0; r < 8; ++r) add_where(sums[r], words[r] >> k & 1, &tile[k][part]);
      });

#pragma unroll
  for (int r = 0; r < 8; ++r)
#pragma unroll
    for (int j = 0; j < 4; ++j) store(c, rows[r], column0 + part + j, sums[r][j]);
}

// What a block of a gradient works on: 64 channels of one tap, kWide columns, the rows of one split.
struct Share {
  int tap, word0, column0, begin, end;
};

__device__ __forceinline__ Share share(const SpikeGradient& c) {
  const int tiles = (c.n + kWide - 1) / kWide, block = blockIdx.x / tiles, each = (c.m + c.splits - 1) / c.splits;
  const int begin = static_cast<int>(blockIdx.y) * each;
  return {static_cast<int>(block % c.shape.taps), static_cast<int>(block / c.shape.taps) * 2,
          static_cast<int>(blockIdx.x % tiles) * kWide, begin, min(begin + each, c.m)};
}

// Calls add() for every kStep rows that hold a spike, with words [2][kStep] and, through put, dy [kStep, kWide] in shared memory.
template <typename T, typename Put, typename Add>
__device__ __forceinline__ void each_rows(const SpikeGradient& c, const Share& s, uint32_t (&words)[2][kStep], Put put, Add add) {
  __shared__ int64_t at[kStep];
  const int per_row = (c.channels + 31) / 32, i = threadIdx.x % kStep, j = threadIdx.x / kStep;
  for (int start = s.begin; start < s.end; start += kStep) {
    uint32_t mine = 0;
    int64_t from = -1;
    if (j < 2 && start + i < s.end) {
      const Pixel p = place(c.shape, start + i);
      const int64_t pixel = source(c.shape, p, s.tap);
      if (pixel >= 0) {
        if (s.word0 + j < per_row) mine = c.words[pixel * per_row + s.word0 + j];
        from = p.image * c.stride_image + p.line * c.stride_line + p.column * c.stride_pixel;
      }
    }
    if (!__syncthreads_or(mine != 0)) continue;
    if (j < 2) words[j][i] = mine;
    if (j == 0) at[i] = from;
    __syncthreads();
    for (int e = threadIdx.x; e < kStep * kWide; e += kThreads) {
      const int row = e / kWide, n = e % kWide;
      const bool inside = at[row] >= 0 && s.column0 + n < c.n;
      put(row, n, inside ? static_cast<const T*>(c.dy)[at[row] + (s.column0 + n) * c.stride_n] : from_float<T>(0.0f));
    }
    __syncthreads();
    add();
  }
}

__device__ __forceinline__ void store(const SpikeGradient& c, const Share& s, int channel, int column, float sum) {
  channel += s.word0 * 32, column += s.column0;
  if (channel >= c.channels || column >= c.n) return;
  c.dw[((static_cast<int64_t>(blockIdx.y) * c.shape.taps + s.tap) * c.channels + channel) * c.n + column] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) gradient_mma(SpikeGradient c) {
  __shared__ uint32_t words[2][kStep];
  alignas(16) __shared__ T tile[kWide][kPad];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int half = warp / 2, part = warp % 2 * (kWide / 2);
  const Share s = share(c);
  float sums[2][kWide / 16][4] = {};

  each_rows<T>(
      c, s, words, [&](int row, int n, T value) { tile[n][row] = value; },
      [&] {
#pragma unroll
        for (int k = 2 * t; k < kStep; k += 16) {
          uint32_t a[2][4];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int bit = 16 * i + g;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const uint32_t left = words[half][k + 8 * e] >> bit, right = words[half][k + 8 * e + 1] >> bit;
              a[i][2 * e] = spike_pair<T>(left, right), a[i][2 * e + 1] = spike_pair<T>(left >> 8, right >> 8);
            }
          }
#pragma unroll
          for (int j = 0; j < kWide / 16; ++j) {
            const T* line = &tile[part + 8 * j + g][k];
            const uint32_t b[2] = {*reinterpret_cast<const uint32_t*>(line), *reinterpret_cast<const uint32_t*>(line + 8)};
            mma<T>(sums[0][j], a[0], b);
            mma<T>(sums[1][j], a[1], b);
          }
        }
      });

#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < kWide / 16; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        store(c, s, 32 * half + 16 * i + g + e / 2 * 8, part + 8 * j + 2 * t + e % 2, sums[i][j][e]);
}

// A thread owns 8 channels and 4 columns.
__global__ void __launch_bounds__(kThreads) gradient_add(SpikeGradient c) {
  __shared__ uint32_t words[2][kStep];
  alignas(16) __shared__ float tile[kStep][kWide];
  const int channel = threadIdx.x / 16 * 8, part = threadIdx.x % 16 * 4;
  const Share s = share(c);
  float sums[8][4] = {};

  each_rows<float>(
      c, s, words, [&](int row, int n, float value) { tile[row][n] = value; },
      [&] {
#pragma unroll 4
        for (int k = 0; k < kStep; ++k) {
          const uint32_t bits = words[channel / 32][k] >> channel % 32;
#pragma unroll
          for (int i = 0; i < 8; ++i) add_where(sums[i], bits >> i & 1, &tile[k][part]);
        }
      });

#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) store(c, s, channel + i, part + j, sums[i][j]);
}

unsigned blocks(const SpikeProduct& c, int columns) { return ceil_div(c.m, kRows) * ceil_div(c.n, columns); }

template <typename T, typename W>
void launch_mma(const SpikeProduct& c, cudaStream_t stream) {
  if (c.n <= 32)
    product_mma<T, W, 32><<<blocks(c, 32), kThreads, 0, stream>>>(c);
  else
    product_mma<T, W, 128><<<blocks(c, 128), kThreads, 0, stream>>>(c);
}

template <typename W>
void launch_add(const SpikeProduct& c, cudaStream_t stream) {
  product_add<W><<<blocks(c, kWide), kThreads, 0, stream>>>(c);
}

int64_t gradient_blocks(int64_t n, int64_t channels, int64_t taps) {
  return int64_t{ceil_div(n, kWide)} * ceil_div(channels, 64) * taps;
}

}  // namespace

int gradient_splits(int64_t m, int64_t n, int64_t channels, int64_t taps) {
  const int64_t wanted = ceil_div(kPrograms, gradient_blocks(n, channels, taps)), possible = ceil_div(m, kSplitRows);
  return static_cast<int>(wanted < possible ? wanted : possible);
}

void spike_product(const SpikeProduct& c, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (c.w_dtype) {
    case WeightDtype::f32: launch_add<float>(c, on); break;
    case WeightDtype::i16: launch_add<int16_t>(c, on); break;
    case WeightDtype::f16: launch_mma<__half, __half>(c, on); break;
    case WeightDtype::bf16: launch_mma<__nv_bfloat16, __nv_bfloat16>(c, on); break;
    case WeightDtype::i8: launch_mma<__half, int8_t>(c, on); break;
  }
  check(cudaGetLastError());
}

void spike_gradient(const SpikeGradient& c, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(gradient_blocks(c.n, c.channels, c.shape.taps)), c.splits);
  switch (c.dy_dtype) {
    case Dtype::f32: gradient_add<<<grid, kThreads, 0, on>>>(c); break;
    case Dtype::f16: gradient_mma<__half><<<grid, kThreads, 0, on>>>(c); break;
    case Dtype::bf16: gradient_mma<__nv_bfloat16><<<grid, kThreads, 0, on>>>(c); break;
  }
  check(cudaGetLastError());
}

}  // namespace spikeclip
