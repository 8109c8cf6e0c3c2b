// From values of a call to constants of its loops.
#pragma once

#include <type_traits>

#include "../lif_step.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {

// Calls f with two flags as constants.
template <typename F>
void by_flags(bool first, bool second, F f) {
  const std::true_type yes;
  const std::false_type no;
  if (first)
    second ? f(yes, yes) : f(yes, no);
  else
    second ? f(no, yes) : f(no, no);
}

// Calls f with a surrogate as a constant.
template <typename F>
void by_surrogate(Surrogate kind, F f) {
  switch (kind) {
    case Surrogate::sigmoid: return f(std::integral_constant<Surrogate, Surrogate::sigmoid>());
    case Surrogate::atan: return f(std::integral_constant<Surrogate, Surrogate::atan>());
    case Surrogate::piecewise_quadratic: return f(std::integral_constant<Surrogate, Surrogate::piecewise_quadratic>());
    case Surrogate::piecewise_exp: return f(std::integral_constant<Surrogate, Surrogate::piecewise_exp>());
    case Surrogate::soft_sign: return f(std::integral_constant<Surrogate, Surrogate::soft_sign>());
    case Surrogate::super_spike: return f(std::integral_constant<Surrogate, Surrogate::super_spike>());
    case Surrogate::erf: return f(std::integral_constant<Surrogate, Surrogate::erf>());
    case Surrogate::triangle: return f(std::integral_constant<Surrogate, Surrogate::triangle>());
  }
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
