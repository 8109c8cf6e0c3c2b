// One warp's product of 16x16 and 16x8 tiles by tensor cores, with spikes made of bits in registers.
//
// Lane 4 g + t holds of a [16, 16]: rows g and g + 8, columns 2t, 2t + 1 and those + 8; of b [16, 8]: column g, rows 2t,
// 2t + 1 and those + 8; of the sums [16, 8]: rows g and g + 8, columns 2t and 2t + 1.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace spikeclip {

template <typename T>
constexpr uint32_t kOne = 0;
template <>
constexpr uint32_t kOne<__half> = 0x3C00;
template <>
constexpr uint32_t kOne<__nv_bfloat16> = 0x3F80;

// Two neighbouring 16-bit spikes, the lowest bits of `low` and `high`.
template <typename T>
__device__ __forceinline__ uint32_t spike_pair(uint32_t low, uint32_t high) {
  return ((low & 1) | (high & 1) << 16) * kOne<T>;
}

#ifdef __CUDACC__
template <typename T>
__device__ __forceinline__ void mma(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma<__half>(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

}  // namespace spikeclip
