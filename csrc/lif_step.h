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
  const float r2 = r * r;  // by pairs of terms, which do not wait for each other
  const float high = multiply_add(1.9875691500e-4f, r, 1.3981999507e-3f);
  const float middle = multiply_add(8.3334519073e-3f, r, 4.1665795894e-2f);
  const float low = multiply_add(1.6666665459e-1f, r, 5.0000001201e-1f);
  const float p = multiply_add(multiply_add(multiply_add(high, r2, middle), r2, low), r2, r) + 1.0f;
  int32_t bits;
  memcpy(&bits, &biased, 4);
  bits = (bits - 0x4B400000 + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  return p * scale;
#endif
}

constexpr bool has_exponential(Surrogate kind) {
  return kind == Surrogate::sigmoid || kind == Surrogate::piecewise_exp || kind == Surrogate::erf;
}

// d(spike)/d(u) at u = h - v_threshold, in two parts: the exponential of surrogates that have one (else u), then what is made of
// it.
template <Surrogate kind>
SPIKECLIP_HD float surrogate_exponential(float u, float alpha) {
  if constexpr (!has_exponential(kind)) {
    return u;
  } else if constexpr (kind == Surrogate::erf) {
    const float z = alpha * u;
    return exp_nonpositive(-z * z);
  } else {
    return exp_nonpositive(-alpha * fabsf(u));
  }
}

template <Surrogate kind>
SPIKECLIP_HD float surrogate_slope(float e, float alpha) {
  const float a = fabsf(e);
  if constexpr (kind == Surrogate::sigmoid) {
    const float d = 1.0f + e;
    return alpha * e / (d * d);
  } else if constexpr (kind == Surrogate::atan) {
    const float z = 1.57079632679f * alpha * e;
    return 0.5f * alpha / (1.0f + z * z);
  } else if constexpr (kind == Surrogate::piecewise_quadratic) {
    const float g = alpha - alpha * alpha * a;
    return g > 0.0f ? g : 0.0f;
  } else if constexpr (kind == Surrogate::piecewise_exp) {
    return 0.5f * alpha * e;
  } else if constexpr (kind == Surrogate::soft_sign) {
    const float d = 1.0f + alpha * a;
    return 0.5f * alpha / (d * d);
  } else if constexpr (kind == Surrogate::super_spike) {
    const float d = 1.0f + a;
    return alpha / (d * d);
  } else if constexpr (kind == Surrogate::erf) {
    return alpha * 0.56418958354f * e;
  } else {
    const float g = 1.0f - alpha * a;
    return g > 0.0f ? g : 0.0f;
  }
}

template <Surrogate kind>
SPIKECLIP_HD float surrogate_grad(float u, float alpha) {
  return surrogate_slope<kind>(surrogate_exponential<kind>(u, alpha), alpha);
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

// From ds (gradient of the spike), dv (gradient of the membrane after reset) and the surrogate's slope at h to dh (gradient of
// the membrane before reset).
SPIKECLIP_HD float lif_step_grad(float slope, float h, float ds, float dv, const LifParams& p) {
  const bool s = h >= p.v_threshold;
  const float dv_ds = p.soft_reset ? -p.v_threshold : p.v_reset - h;
  const float dv_dh = (s && !p.soft_reset) ? 0.0f : 1.0f;
  const float through_reset = p.detach_reset ? 0.0f : dv * dv_ds;
  return (ds + through_reset) * slope + dv * dv_dh;
}

// d(h)/d(tau); `v` is the membrane before the charge.
SPIKECLIP_HD float lif_charge_grad_tau(float v, float x, const LifParams& p) {
  const float leak = v - p.v_reset;
  return (p.decay_input ? leak - x : leak) / (p.tau * p.tau);
}

}  // namespace spikeclip
