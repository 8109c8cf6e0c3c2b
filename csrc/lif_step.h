// One time-step of the (leaky) integrate-and-fire neuron, forward and backward: the only place with this math in C++.
//
//   charge:  h = v + (x - (v - v_reset)) / tau      (decay_input)      or   h = v - (v - v_reset) / tau + x
//   fire:    s = h >= v_threshold
//   reset:   v = s ? v_reset : h                    (hard)             or   v = h - s * v_threshold   (soft)
//
// Every function is branch-free in its data, so that the loops over neurons vectorise.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define SPIKECLIP_HD __host__ __device__ __forceinline__
#else
#define SPIKECLIP_HD inline __attribute__((always_inline))
#endif

namespace spikeclip {

enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2 };

// The order is the order of the rows in spikeclip/ops/surrogate.py.
enum class Surrogate : int {
  sigmoid = 0,
  atan = 1,
  piecewise_quadratic = 2,
  piecewise_exp = 3,
  soft_sign = 4,
  super_spike = 5,
  erf = 6,
  triangle = 7,
};

struct LifParams {
  float tau;
  float v_threshold;
  float v_reset;  // 0 under soft reset: the leak is then towards 0
  float alpha;
  bool decay_input;
  bool soft_reset;
  bool detach_reset;
};

// a * b + c where rounding is free to choose; never use it where spikes must equal those of plain torch.
SPIKECLIP_HD float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__CUDA_ARCH__)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// a / tau, correctly rounded. A division costs ten times a multiplication on a CPU, so where fused multiply-add exists
// the quotient is a product corrected once (Markstein 1990), exact outside the subnormals; `1 / tau` leaves the loop.
// Where a or tau is infinite there is nothing to correct.
SPIKECLIP_HD float divide_by_tau(float a, float tau) {
#if defined(__FMA__) && !defined(__CUDA_ARCH__)
  const float inverse = 1.0f / tau;
  const float q = a * inverse;
  const float remainder = fmaf(-q, tau, a);
  return remainder == remainder ? fmaf(remainder, inverse, q) : q;
#else
  return a / tau;
#endif
}

// exp(x) for x <= 0, error below 2 ulp, written so that host compilers vectorise it.
SPIKECLIP_HD float exp_nonpositive(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  x = x < -87.0f ? -87.0f : x;
  const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const float biased = multiply_add(x, 1.44269504f, shifter);
  const float n = biased - shifter;
  const float r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, x));
  float p = 1.9875691500e-4f;
  p = multiply_add(p, r, 1.3981999507e-3f);
  p = multiply_add(p, r, 8.3334519073e-3f);
  p = multiply_add(p, r, 4.1665795894e-2f);
  p = multiply_add(p, r, 1.6666665459e-1f);
  p = multiply_add(p, r, 5.0000001201e-1f);
  p = multiply_add(p * r, r, r) + 1.0f;
  int32_t bits;
  memcpy(&bits, &biased, 4);
  bits = (bits - 0x4B400000 + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  return p * scale;
#endif
}

// d(spike)/d(u) at u = h - v_threshold.
template <Surrogate kind>
SPIKECLIP_HD float surrogate_grad(float u, float alpha) {
  const float a = fabsf(u);
  if constexpr (kind == Surrogate::sigmoid) {
    const float e = exp_nonpositive(-alpha * a);
    const float d = 1.0f + e;
    return alpha * e / (d * d);
  } else if constexpr (kind == Surrogate::atan) {
    const float z = 1.57079632679f * alpha * u;
    return 0.5f * alpha / (1.0f + z * z);
  } else if constexpr (kind == Surrogate::piecewise_quadratic) {
    const float g = alpha - alpha * alpha * a;
    return g > 0.0f ? g : 0.0f;
  } else if constexpr (kind == Surrogate::piecewise_exp) {
    return 0.5f * alpha * exp_nonpositive(-alpha * a);
  } else if constexpr (kind == Surrogate::soft_sign) {
    const float d = 1.0f + alpha * a;
    return 0.5f * alpha / (d * d);
  } else if constexpr (kind == Surrogate::super_spike) {
    const float d = 1.0f + a;
    return alpha / (d * d);
  } else if constexpr (kind == Surrogate::erf) {
    const float z = alpha * u;
    return alpha * 0.56418958354f * exp_nonpositive(-z * z);
  } else {
    const float g = 1.0f - alpha * a;
    return g > 0.0f ? g : 0.0f;
  }
}

SPIKECLIP_HD float lif_charge(float v, float x, const LifParams& p) {
  const float leak = v - p.v_reset;
  return p.decay_input ? v + divide_by_tau(x - leak, p.tau) : (v - divide_by_tau(leak, p.tau)) + x;
}

SPIKECLIP_HD float lif_reset(float h, const LifParams& p) {
  const bool s = h >= p.v_threshold;
  const float soft = h - (s ? p.v_threshold : 0.0f);
  const float hard = s ? p.v_reset : h;
  return p.soft_reset ? soft : hard;
}

// From ds (gradient of the spike) and dv (gradient of the membrane after reset) to dh (gradient of the membrane before it).
template <Surrogate kind>
SPIKECLIP_HD float lif_step_grad(float h, float ds, float dv, const LifParams& p) {
  const bool s = h >= p.v_threshold;
  const float dv_ds = p.soft_reset ? -p.v_threshold : p.v_reset - h;
  const float dv_dh = (s && !p.soft_reset) ? 0.0f : 1.0f;
  const float through_reset = p.detach_reset ? 0.0f : dv * dv_ds;
  return (ds + through_reset) * surrogate_grad<kind>(h - p.v_threshold, p.alpha) + dv * dv_dh;
}

// d(h)/d(tau); `v` is the membrane before the charge.
SPIKECLIP_HD float lif_charge_grad_tau(float v, float x, const LifParams& p) {
  const float leak = v - p.v_reset;
  return (p.decay_input ? leak - x : leak) / (p.tau * p.tau);
}

}  // namespace spikeclip
