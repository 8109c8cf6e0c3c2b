// The gradient of a time-step by a surrogate that is known at run-time.
#pragma once

#include "values.cuh"

namespace spikeclip {

__device__ __forceinline__ float surrogate_grad(Surrogate kind, float u, float alpha) {
  switch (kind) {
    case Surrogate::sigmoid: return surrogate_grad<Surrogate::sigmoid>(u, alpha);
    case Surrogate::atan: return surrogate_grad<Surrogate::atan>(u, alpha);
    case Surrogate::piecewise_quadratic: return surrogate_grad<Surrogate::piecewise_quadratic>(u, alpha);
    case Surrogate::piecewise_exp: return surrogate_grad<Surrogate::piecewise_exp>(u, alpha);
    case Surrogate::soft_sign: return surrogate_grad<Surrogate::soft_sign>(u, alpha);
    case Surrogate::super_spike: return surrogate_grad<Surrogate::super_spike>(u, alpha);
    case Surrogate::erf: return surrogate_grad<Surrogate::erf>(u, alpha);
    default: return surrogate_grad<Surrogate::triangle>(u, alpha);
  }
}

__device__ __forceinline__ float step_grad(Surrogate kind, float h, float ds, float dv, const LifParams& p) {
  return lif_step_grad(surrogate_grad(kind, h - p.v_threshold, p.alpha), h, ds, dv, p);
}

}  // namespace spikeclip
