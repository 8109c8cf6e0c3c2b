// The gradient of a time-step by a surrogate that is known at run-time.
#pragma once

#include "values.cuh"

namespace spikeclip {

__device__ __forceinline__ float step_grad(Surrogate kind, float h, float ds, float dv, const LifParams& p) {
  switch (kind) {
    case Surrogate::sigmoid: return lif_step_grad<Surrogate::sigmoid>(h, ds, dv, p);
    case Surrogate::atan: return lif_step_grad<Surrogate::atan>(h, ds, dv, p);
    case Surrogate::piecewise_quadratic: return lif_step_grad<Surrogate::piecewise_quadratic>(h, ds, dv, p);
    case Surrogate::piecewise_exp: return lif_step_grad<Surrogate::piecewise_exp>(h, ds, dv, p);
    case Surrogate::soft_sign: return lif_step_grad<Surrogate::soft_sign>(h, ds, dv, p);
    case Surrogate::super_spike: return lif_step_grad<Surrogate::super_spike>(h, ds, dv, p);
    case Surrogate::erf: return lif_step_grad<Surrogate::erf>(h, ds, dv, p);
    default: return lif_step_grad<Surrogate::triangle>(h, ds, dv, p);
  }
}

}  // namespace spikeclip
