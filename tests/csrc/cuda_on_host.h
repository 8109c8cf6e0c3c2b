// Enough of CUDA to run kernels on the host: the threads of a block are fibers of one thread, which take turns at barriers.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y;
  dim3(unsigned x, unsigned y = 1) : x(x), y(y) {}
};
inline dim3 blockIdx(0, 0), threadIdx(0, 0);

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }

template <typename T>
T min(T a, T b) {
  return a < b ? a : b;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(x); }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct __half {
  _Float16 value;
};
inline float __half2float(__half x) { return x.value; }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

namespace host {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done = true;
};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current, threads;
inline std::function<void()> body;

inline void give_way() { swapcontext(&fibers[current].context, &scheduler); }

struct Barrier {
  unsigned arrived = 0, turn = 0;
  void wait(unsigned size) {
    const unsigned mine = turn;
    if (++arrived == size)
      arrived = 0, ++turn;
    else
      while (turn == mine) give_way();
  }
};
inline Barrier block_barrier, warp_barriers[32];
inline std::map<unsigned, bool> votes;  // by the block barrier's turn

inline void sync_warp() { warp_barriers[current / 32].wait(32); }

// Every lane's value, seen by all lanes of the warp; a second barrier before the slots are written again.
template <typename T, typename Use>
auto exchange(T value, Use use) {
  static T slots[32][32];
  T* lanes = slots[current / 32];
  lanes[current % 32] = value;
  sync_warp();
  const auto result = use(lanes);
  sync_warp();
  return result;
}

inline void run_fiber() {
  body();
  fibers[current].done = true;
  give_way();
}

}  // namespace host

inline void __syncthreads() { host::block_barrier.wait(host::threads); }
inline int __syncthreads_or(int vote) {
  bool& any = host::votes[host::block_barrier.turn];
  any = any || vote != 0;
  __syncthreads();
  return any;
}
inline uint32_t __ballot_sync(unsigned, bool vote) {
  return host::exchange(vote, [](const bool* lanes) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= uint32_t{lanes[lane]} << lane;
    return bits;
  });
}
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return host::exchange(value, [&](const T* lanes) { return lanes[from % 32]; });
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int by) {
  const unsigned from = host::current % 32 + by;
  return host::exchange(value, [&](const T* lanes) { return lanes[from < 32 ? from : host::current % 32]; });
}

namespace spikeclip {

struct MmaOperands {
  uint32_t a[4], b[2];
};

inline float widened(__half x) { return __half2float(x); }
inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
float half_of(uint32_t pair, int which) {
  const uint16_t bits = static_cast<uint16_t>(pair >> 16 * which);
  T value;
  std::memcpy(&value, &bits, 2);
  return widened(value);
}

// Element (row, column) of a [16, 16] is half column % 2 of register 2 (column / 8) + row / 8 of lane 4 (row % 8) + column % 8 / 2;
// (row, column) of b [16, 8] is half row % 2 of register row / 8 of lane 4 column + row % 8 / 2.
template <typename T>
void mma(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaOperands mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  host::exchange(mine, [&](const MmaOperands* lanes) {
    const int lane = host::current % 32;
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
      for (int k = 0; k < 16; ++k) {
        const float x = half_of<T>(lanes[row % 8 * 4 + k % 8 / 2].a[k / 8 * 2 + row / 8], k % 2);
        sums[e] += x * half_of<T>(lanes[column * 4 + k % 8 / 2].b[k / 8], k % 2);
      }
    }
    return 0;
  });
}

}  // namespace spikeclip

template <typename Kernel, typename Call>
void launch_on_host(Kernel kernel, dim3 blocks, unsigned threads, const Call& call) {
  using namespace host;
  host::threads = threads;
  if (fibers.size() < threads) fibers.resize(threads);
  body = [&] { kernel(call); };
  for (blockIdx.y = 0; blockIdx.y < blocks.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x) {
      block_barrier = {};
      votes.clear();
      for (Barrier& barrier : warp_barriers) barrier = {};
      for (unsigned i = 0; i < threads; ++i) {
        getcontext(&fibers[i].context);
        fibers[i].context.uc_stack.ss_sp = fibers[i].stack.data();
        fibers[i].context.uc_stack.ss_size = fibers[i].stack.size();
        fibers[i].context.uc_link = nullptr;
        fibers[i].done = false;
        makecontext(&fibers[i].context, run_fiber, 0);
      }
      for (unsigned left = threads; left > 0;)
        for (unsigned i = 0; i < threads; ++i) {
          if (fibers[i].done) continue;
          current = threadIdx.x = i;
          swapcontext(&scheduler, &fibers[i].context);
          left -= fibers[i].done;
        }
    }
}
