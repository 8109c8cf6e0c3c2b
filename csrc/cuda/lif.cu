// A thread owns kVector neighbouring neurons for all T steps. The backward pass recomputes the membrane h from x, one
// segment of kSegment steps in registers at a time; the first membranes of later segments are parked, as bits, in slots of
// dx that are not yet due, so that nothing of the size of x is allocated.
#include "lif.cuh"

#include "step.cuh"
#include "values.cuh"

namespace spikeclip {
namespace {

constexpr int kThreads = 128;

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load(const void* base, int64_t at) {
  return *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(base) + at);
}

template <typename T, int V>
__device__ __forceinline__ void store(void* base, int64_t at, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(static_cast<T*>(base) + at) = pack;
}

template <int V>
__device__ __forceinline__ Pack<float, V> start(const float* v0, const LifParams& p, int64_t at) {
  if (v0 != nullptr) return load<float, V>(v0, at);
  Pack<float, V> v;
#pragma unroll
  for (int i = 0; i < V; ++i) v.value[i] = p.v_reset;
  return v;
}

template <typename X, typename S, int V>
__global__ void __launch_bounds__(kThreads) forward(LifForward c) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (at >= c.n) return;
  LifParams p = c.params;
  if (c.tau != nullptr) p.tau = *c.tau;
  Pack<float, V> v = start<V>(c.v0, p, at);
#pragma unroll 4
  for (int64_t t = 0; t < c.steps; ++t) {
    const Pack<X, V> x = load<X, V>(c.x, t * c.n + at);
    Pack<S, V> spikes;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float h = lif_charge(v.value[i], to_float(x.value[i]), p);
      spikes.value[i] = from_float<S>(h >= p.v_threshold ? 1.0f : 0.0f);
      v.value[i] = lif_reset(h, p);
    }
    store<S, V>(c.spikes, t * c.n + at, spikes);
  }
  store<float, V>(c.v_last, at, v);
}

// A float32 membrane in dx at step t, or in steps t and t - 1 when dx has 16 bits.
template <typename X, int V>
__device__ __forceinline__ void park(void* dx, int64_t t, int64_t n, int64_t at, const Pack<float, V>& v) {
  if constexpr (sizeof(X) == 4) {
    store<float, V>(dx, t * n + at, v);
  } else {
    Pack<uint16_t, V> high, low;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const uint32_t bits = __float_as_uint(v.value[i]);
      high.value[i] = static_cast<uint16_t>(bits >> 16);
      low.value[i] = static_cast<uint16_t>(bits);
    }
    store<uint16_t, V>(dx, t * n + at, high);
    store<uint16_t, V>(dx, (t - 1) * n + at, low);
  }
}

template <typename X, int V>
__device__ __forceinline__ Pack<float, V> unpark(const void* dx, int64_t t, int64_t n, int64_t at) {
  if constexpr (sizeof(X) == 4) {
    return load<float, V>(dx, t * n + at);
  } else {
    const Pack<uint16_t, V> high = load<uint16_t, V>(dx, t * n + at), low = load<uint16_t, V>(dx, (t - 1) * n + at);
    Pack<float, V> v;
#pragma unroll
    for (int i = 0; i < V; ++i) v.value[i] = __uint_as_float(static_cast<uint32_t>(high.value[i]) << 16 | low.value[i]);
    return v;
  }
}

__device__ double block_sum(double value) {
  __shared__ double warps[kThreads / 32];
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_down_sync(0xffffffffu, value, lane);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.0;
  for (double warp : warps) total += warp;
  return total;
}

template <typename X, typename G, int V, int kSegment>
__global__ void __launch_bounds__(kThreads) backward(LifBackward c) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
  LifParams p = c.params;
  if (c.tau != nullptr) p.tau = *c.tau;
  const float inverse = 1.0f / p.tau;
  const float to_x = p.decay_input ? inverse : 1.0f, to_v = 1.0f - inverse;
  double dtau = 0.0;
  if (at < c.n) {
    const Pack<float, V> v_start = start<V>(c.v0, p, at);
    const int64_t segments = (c.steps + kSegment - 1) / kSegment;
    Pack<float, V> v = v_start;
    for (int64_t t = 0; t < (segments - 1) * kSegment; ++t) {
      const Pack<X, V> x = load<X, V>(c.x, t * c.n + at);
#pragma unroll
      for (int i = 0; i < V; ++i) v.value[i] = lif_reset(lif_charge(v.value[i], to_float(x.value[i]), p), p);
      if ((t + 1) % kSegment == 0) park<X, V>(c.dx, t, c.n, at, v);
    }
    Pack<float, V> dv;
#pragma unroll
    for (int i = 0; i < V; ++i) dv.value[i] = 0.0f;
    if (c.dv_last != nullptr) dv = load<float, V>(c.dv_last, at);
    for (int64_t segment = segments - 1; segment >= 0; --segment) {
      const int64_t first = segment * kSegment;
      Pack<float, V> before[kSegment + 1], h[kSegment];
      before[0] = segment == 0 ? v_start : unpark<X, V>(c.dx, first - 1, c.n, at);
#pragma unroll
      for (int k = 0; k < kSegment; ++k) {
        if (first + k < c.steps) {
          const Pack<X, V> x = load<X, V>(c.x, (first + k) * c.n + at);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            h[k].value[i] = lif_charge(before[k].value[i], to_float(x.value[i]), p);
            before[k + 1].value[i] = lif_reset(h[k].value[i], p);
          }
        }
      }
#pragma unroll
      for (int k = kSegment - 1; k >= 0; --k) {
        if (first + k < c.steps) {
          const int64_t here = (first + k) * c.n + at;
          Pack<float, V> dh;
#pragma unroll
          for (int i = 0; i < V; ++i) dh.value[i] = 0.0f;
          if (c.ds != nullptr) {
            const Pack<G, V> ds = load<G, V>(c.ds, here);
#pragma unroll
            for (int i = 0; i < V; ++i) dh.value[i] = to_float(ds.value[i]);
          }
          Pack<X, V> dx;
#pragma unroll
          for (int i = 0; i < V; ++i) {
            dh.value[i] = step_grad(c.surrogate, h[k].value[i], dh.value[i], dv.value[i], p);
            dx.value[i] = from_float<X>(dh.value[i] * to_x);
            dv.value[i] = dh.value[i] * to_v;
          }
          if (c.dtau != nullptr) {
            const Pack<X, V> x = load<X, V>(c.x, here);
#pragma unroll
            for (int i = 0; i < V; ++i)
              dtau += static_cast<double>(
                  dh.value[i] * lif_charge_grad_tau(before[k].value[i], to_float(x.value[i]), p));
          }
          store<X, V>(c.dx, here, dx);
        }
      }
    }
    if (c.dv0 != nullptr) store<float, V>(c.dv0, at, dv);
  }
  if (c.dtau != nullptr) {
    const double total = block_sum(dtau);
    if (threadIdx.x == 0) c.dtau[blockIdx.x] = total;
  }
}

bool aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

unsigned blocks(int64_t n, int vector) { return static_cast<unsigned>((n + kThreads * vector - 1) / (kThreads * vector)); }

template <typename X, typename S>
cudaError_t launch(const LifForward& c, cudaStream_t stream) {
  const bool wide = c.n % 4 == 0 && aligned(c.x, 4 * sizeof(X)) && aligned(c.spikes, 4 * sizeof(S)) &&
                    aligned(c.v0, 16) && aligned(c.v_last, 16);
  if (wide)
    forward<X, S, 4><<<blocks(c.n, 4), kThreads, 0, stream>>>(c);
  else
    forward<X, S, 1><<<blocks(c.n, 1), kThreads, 0, stream>>>(c);
  return cudaGetLastError();
}

template <typename X, typename G>
cudaError_t launch(const LifBackward& c, cudaStream_t stream) {
  const bool wide = c.n % 2 == 0 && aligned(c.x, 2 * sizeof(X)) && aligned(c.ds, 2 * sizeof(G)) &&
                    aligned(c.dx, 2 * sizeof(X)) && aligned(c.v0, 8) && aligned(c.dv_last, 8) && aligned(c.dv0, 8);
  if (wide && c.steps <= 4)
    backward<X, G, 2, 4><<<blocks(c.n, 2), kThreads, 0, stream>>>(c);
  else if (wide)
    backward<X, G, 2, 8><<<blocks(c.n, 2), kThreads, 0, stream>>>(c);
  else
    backward<X, G, 1, 8><<<blocks(c.n, 1), kThreads, 0, stream>>>(c);
  return cudaGetLastError();
}

}  // namespace

int64_t tau_partials(int64_t n) { return (n + kThreads - 1) / kThreads; }

void lif_forward(const LifForward& c, void* stream) {
  check(by_dtype(c.x_dtype, c.spike_dtype, [&](auto x, auto spike) {
    return launch<decltype(x), decltype(spike)>(c, static_cast<cudaStream_t>(stream));
  }));
}

void lif_backward(const LifBackward& c, void* stream) {
  check(by_dtype(c.x_dtype, c.ds == nullptr ? c.x_dtype : c.ds_dtype, [&](auto x, auto ds) {
    return launch<decltype(x), decltype(ds)>(c, static_cast<cudaStream_t>(stream));
  }));
}

}  // namespace spikeclip
