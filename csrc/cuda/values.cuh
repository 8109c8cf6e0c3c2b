// Values of the tensors' dtypes on the device, kernels by dtype, and errors of launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "../lif_step.h"

namespace spikeclip {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(int16_t x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(int8_t x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(uint8_t x) { return static_cast<float>(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ uint8_t from_float<uint8_t>(float x) { return static_cast<uint8_t>(x); }

__device__ __forceinline__ void store_value(void* base, Dtype dtype, int64_t at, float x) {
  if (dtype == Dtype::f32)
    static_cast<float*>(base)[at] = x;
  else if (dtype == Dtype::f16)
    static_cast<__half*>(base)[at] = __float2half_rn(x);
  else
    static_cast<__nv_bfloat16*>(base)[at] = __float2bfloat16_rn(x);
}

// Calls use with a value of either type; the second dtype is the first, or any for float32.
template <typename Use>
cudaError_t by_dtype(Dtype first, Dtype second, Use use) {
  if (first == Dtype::f32 && second == Dtype::f32) return use(float(), float());
  if (first == Dtype::f32 && second == Dtype::f16) return use(float(), __half());
  if (first == Dtype::f32 && second == Dtype::bf16) return use(float(), __nv_bfloat16());
  if (first == Dtype::f16 && second == Dtype::f16) return use(__half(), __half());
  if (first == Dtype::bf16 && second == Dtype::bf16) return use(__nv_bfloat16(), __nv_bfloat16());
  return cudaErrorInvalidValue;
}

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

inline unsigned ceil_div(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

}  // namespace spikeclip
