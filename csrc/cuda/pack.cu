// A warp makes kWords neighbouring words: a lane holds one value of each, and a ballot is the word.
#include "pack.cuh"

#include "values.cuh"

namespace spikeclip {
namespace {

constexpr int kThreads = 256, kWords = 4;

template <typename Use>
__device__ __forceinline__ void each_word(const PackCall& c, Use use) {
  const int lane = threadIdx.x % 32;
  const int64_t per_row = (c.length + 31) / 32, words = c.rows * per_row;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32) * kWords;
  int64_t row = first / per_row, in_row = first % per_row;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int64_t column = in_row * 32 + lane;
    if (first + i < words) use(i, first + i, row * c.length + column, column < c.length);
    if (++in_row == per_row) in_row = 0, ++row;
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads) pack_words(PackCall c) {
  const S* s = static_cast<const S*>(c.s);
  const int lane = threadIdx.x % 32;
  bool binary = true;
  each_word(c, [&](int i, int64_t word, int64_t at, bool inside) {
    const float value = inside ? to_float(s[at]) : 0.0f;
    const uint32_t bits = __ballot_sync(0xffffffffu, value != 0.0f);
    binary = binary && (value == 0.0f || value == 1.0f);
    if (lane == i) c.words[word] = bits;
  });
  if (c.flag != nullptr && !binary) *c.flag = 1;
}

template <typename S>
__global__ void __launch_bounds__(kThreads) unpack_words(PackCall c) {
  S* s = static_cast<S*>(c.s);
  const int lane = threadIdx.x % 32;
  each_word(c, [&](int, int64_t word, int64_t at, bool inside) {
    if (inside) s[at] = from_float<S>(c.words[word] >> lane & 1 ? 1.0f : 0.0f);
  });
}

unsigned blocks(const PackCall& c) { return ceil_div(c.rows * ((c.length + 31) / 32), kThreads / 32 * kWords); }

template <typename S>
void launch_pack(const PackCall& c, cudaStream_t stream) {
  pack_words<S><<<blocks(c), kThreads, 0, stream>>>(c);
}

template <typename S>
void launch_unpack(const PackCall& c, cudaStream_t stream) {
  unpack_words<S><<<blocks(c), kThreads, 0, stream>>>(c);
}

}  // namespace

void pack(const PackCall& c, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (c.dtype) {
    case SpikeDtype::f32: launch_pack<float>(c, on); break;
    case SpikeDtype::f16: launch_pack<__half>(c, on); break;
    case SpikeDtype::bf16: launch_pack<__nv_bfloat16>(c, on); break;
    case SpikeDtype::u8: launch_pack<uint8_t>(c, on); break;
  }
  check(cudaGetLastError());
}

void unpack(const PackCall& c, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (c.dtype) {
    case SpikeDtype::f32: launch_unpack<float>(c, on); break;
    case SpikeDtype::f16: launch_unpack<__half>(c, on); break;
    case SpikeDtype::bf16: launch_unpack<__nv_bfloat16>(c, on); break;
    case SpikeDtype::u8: launch_unpack<uint8_t>(c, on); break;
  }
  check(cudaGetLastError());
}

}  // namespace spikeclip
