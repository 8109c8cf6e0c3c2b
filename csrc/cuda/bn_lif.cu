// Forward, a warp owns kWords neighbouring words of spikes for all T steps: a lane holds one channel of each, and a ballot is
// the word. Where sums by channel are made, a lane owns a channel of neighbouring rows, of which each warp takes every
// kWarps-th; sums lie in float32 until every block has written its own. The backward pass recomputes currents and membranes
// from x, those of all steps in registers.
#include "bn_lif.cuh"

#include <algorithm>
#include <type_traits>

#include "step.cuh"
#include "values.cuh"

namespace spikeclip {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32, kWords = 4;
constexpr int64_t kBlocks = 4096;   // about as many as a device's processors share well
constexpr int64_t kMostRows = 256;  // a lane's, so that its float32 sums stay short

// Blocks of neighbouring channels are neighbours.
struct Place {
  int64_t part, channel, begin, end;
  bool inside;

  __device__ __forceinline__ Place(int64_t rows, int64_t channels, int64_t parts) {
    const int64_t blocks = (channels + 31) / 32;
    part = blockIdx.x / blocks;
    channel = blockIdx.x % blocks * 32 + threadIdx.x % 32;
    begin = part * rows / parts + threadIdx.x / 32;
    end = (part + 1) * rows / parts;
    inside = channel < channels;
  }
};

// Every thread of the block takes part.
__device__ __forceinline__ void store_sums(float* sums, const Place& p, int64_t channels, float first, float second) {
  __shared__ float of_warps[2][kWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  of_warps[0][warp][lane] = first;
  of_warps[1][warp][lane] = second;
  __syncthreads();
  if (warp >= 2 || !p.inside) return;
  float total = 0.0f;
  for (int i = 0; i < kWarps; ++i) total += of_warps[warp][i][lane];
  sums[(p.part * 2 + warp) * channels + p.channel] = total;
}

template <typename X>
__global__ void __launch_bounds__(kThreads) stats(BnStats c) {
  const Place p(c.rows, c.channels, c.parts);
  float plain = 0.0f, square = 0.0f;
  if (p.inside) {
    const X* x = static_cast<const X*>(c.x) + p.channel;
    const float first = to_float(x[0]);
#pragma unroll 8
    for (int64_t row = p.begin; row < p.end; row += kWarps) {
      const float d = to_float(x[row * c.channels]) - first;
      plain += d;
      square += d * d;
    }
  }
  store_sums(c.sums, p, c.channels, plain, square);
}

template <typename X, typename S>
__global__ void __launch_bounds__(kThreads) forward(BnLifForward c) {
  constexpr bool kPacked = std::is_same_v<S, uint32_t>;
  const X* x = static_cast<const X*>(c.x);
  S* spikes = static_cast<S*>(c.spikes);
  const int lane = threadIdx.x % 32;
  const int64_t per_row = (c.channels + 31) / 32, words = c.rows * per_row, n = c.rows * c.channels;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32) * kWords;
  LifParams p = c.params;
  if (c.tau != nullptr) p.tau = *c.tau;
  float v[kWords], scale[kWords], shift[kWords];
  int64_t at[kWords];
  bool inside[kWords];
  int64_t row = first / per_row, in_row = first % per_row;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int64_t column = in_row * 32 + lane;
    inside[i] = first + i < words && column < c.channels;
    at[i] = row * c.channels + column;
    const bool scaled = inside[i] && c.scale != nullptr;
    scale[i] = scaled ? c.scale[column] : 1.0f;
    shift[i] = scaled ? c.shift[column] : 0.0f;
    v[i] = inside[i] && c.v0 != nullptr ? c.v0[at[i]] : p.v_reset;
    if (++in_row == per_row) in_row = 0, ++row;
  }
  for (int64_t t = 0; t < c.steps; ++t) {
    float value[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) value[i] = inside[i] ? to_float(x[t * n + at[i]]) : 0.0f;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const float h = lif_charge(v[i], value[i] * scale[i] + shift[i], p);
      const bool spike = inside[i] && h >= p.v_threshold;
      if constexpr (kPacked) {
        const uint32_t bits = __ballot_sync(0xffffffffu, spike);
        if (lane == i && first + i < words) spikes[t * words + first + i] = bits;
      } else {
        if (inside[i]) spikes[t * n + at[i]] = from_float<S>(spike ? 1.0f : 0.0f);
      }
      v[i] = lif_reset(h, p);
    }
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i)
    if (inside[i]) c.v_last[at[i]] = v[i];
}

template <typename X, typename G, int kSteps>
__global__ void __launch_bounds__(kThreads) backward(BnLifBackward c) {
  const Place place(c.rows, c.channels, c.parts);
  float plain = 0.0f, centred = 0.0f;
  if (place.inside) {
    const LifParams& p = c.params;
    const float inverse = 1.0f / p.tau;
    const float to_z = p.decay_input ? inverse : 1.0f, to_v = 1.0f - inverse;
    const float scale = c.scale[place.channel], shift = c.shift[place.channel], mean = c.mean[place.channel];
    float factors[3] = {};
    if (c.factors != nullptr)
      for (int i = 0; i < 3; ++i) factors[i] = c.factors[i * c.channels + place.channel];
    const int64_t n = c.rows * c.channels;
    for (int64_t row = place.begin; row < place.end; row += kWarps) {
      const X* xs = static_cast<const X*>(c.x) + row * c.channels + place.channel;
      const G* dss = static_cast<const G*>(c.ds) + row * c.channels + place.channel;
      X* dx = static_cast<X*>(c.dx) + row * c.channels + place.channel;
      float x[kSteps], ds[kSteps], h[kSteps];
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        x[k] = k < c.steps ? to_float(xs[k * n]) : 0.0f;
        ds[k] = k < c.steps ? to_float(dss[k * n]) : 0.0f;
      }
      float v = p.v_reset;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        h[k] = lif_charge(v, x[k] * scale + shift, p);
        v = lif_reset(h[k], p);
      }
      float dv = 0.0f;
#pragma unroll
      for (int k = kSteps - 1; k >= 0; --k) {
        if (k < c.steps) {
          const float dh = step_grad(c.surrogate, h[k], ds[k], dv, p), dz = dh * to_z;
          dv = dh * to_v;
          plain += dz;
          centred += dz * (x[k] - mean);
          if (c.factors != nullptr) dx[k * n] = from_float<X>(factors[0] * dz + (factors[1] * x[k] + factors[2]));
        }
      }
    }
  }
  if (c.sums != nullptr) store_sums(c.sums, place, c.channels, plain, centred);
}

unsigned blocks_of(int64_t channels, int64_t parts) { return static_cast<unsigned>((channels + 31) / 32 * parts); }

template <typename X>
cudaError_t launch(const BnStats& c, cudaStream_t stream) {
  stats<X><<<blocks_of(c.channels, c.parts), kThreads, 0, stream>>>(c);
  return cudaGetLastError();
}

template <typename X, typename S>
cudaError_t launch(const BnLifForward& c, cudaStream_t stream) {
  forward<X, S><<<ceil_div(c.rows * ((c.channels + 31) / 32), kWarps * kWords), kThreads, 0, stream>>>(c);
  return cudaGetLastError();
}

template <typename X, typename G>
cudaError_t launch(const BnLifBackward& c, cudaStream_t stream) {
  if (c.steps <= 4)
    backward<X, G, 4><<<blocks_of(c.channels, c.parts), kThreads, 0, stream>>>(c);
  else
    backward<X, G, 8><<<blocks_of(c.channels, c.parts), kThreads, 0, stream>>>(c);
  return cudaGetLastError();
}

}  // namespace

int64_t bn_parts(int64_t rows, int64_t channels) {
  const int64_t busy = kBlocks / ((channels + 31) / 32) + 1, brief = rows / (kWarps * kMostRows) + 1;
  return std::min(std::max(busy, brief), (rows + kWarps - 1) / kWarps);
}

void bn_stats(const BnStats& c, void* stream) {
  check(by_dtype(c.x_dtype, c.x_dtype, [&](auto x, auto) {
    return launch<decltype(x)>(c, static_cast<cudaStream_t>(stream));
  }));
}

void bn_lif_forward(const BnLifForward& c, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  check(by_dtype(c.x_dtype, c.packed ? c.x_dtype : c.spike_dtype, [&](auto x, auto spike) {
    return c.packed ? launch<decltype(x), uint32_t>(c, on) : launch<decltype(x), decltype(spike)>(c, on);
  }));
}

void bn_lif_backward(const BnLifBackward& c, void* stream) {
  check(by_dtype(c.x_dtype, c.ds_dtype, [&](auto x, auto ds) {
    return launch<decltype(x), decltype(ds)>(c, static_cast<cudaStream_t>(stream));
  }));
}

}  // namespace spikeclip
