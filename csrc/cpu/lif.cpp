// Compiled once per instruction set, with SPIKECLIP_ISA naming it; loops over neurons are left to the vectoriser.
//
// A thread walks blocks of neurons narrow enough for one block's state over all T steps to stay in cache. The backward
// pass recomputes the membrane h of its block from x, so that h never reaches memory: x and ds are read once, dx is
// written once.
#include "lif.h"

#include <algorithm>
#include <memory>
#include <new>

#include "convert.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {
namespace {

constexpr int64_t kMaxBlock = 1024;
constexpr int64_t kSerialBelow = 32768;  // elements; starting threads costs more than the work

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};

std::unique_ptr<float[], AlignedDelete> scratch(int64_t count) {
  return std::unique_ptr<float[], AlignedDelete>(
      static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t(64))));
}

// Rows of one block lie a whole time-step apart, too far for the hardware to see the next block coming.
void prefetch_row(const void* base, Dtype dtype, int64_t offset, int64_t width) {
  if (base == nullptr) return;
  const int64_t size = dtype == Dtype::f32 ? 4 : 2;
  const char* row = static_cast<const char*>(base) + offset * size;
  for (int64_t i = 0; i < width * size; i += 64) __builtin_prefetch(row + i);
}

int team(int threads, int64_t elements) { return elements < kSerialBelow ? 1 : threads; }

void start(const float* v0, const LifParams& p, int64_t first, int64_t width, float* v) {
  if (v0 != nullptr)
    std::copy(v0 + first, v0 + first + width, v);
  else
    std::fill(v, v + width, p.v_reset);
}

template <bool decay_input, bool soft_reset, typename Spike>
void forward_step(const float* x, float* v, Spike* spikes, Spike one, int64_t width, const LifParams& params) {
  LifParams p = params;
  p.decay_input = decay_input;
  p.soft_reset = soft_reset;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float h = lif_charge(v[i], x[i], p);
    spikes[i] = h >= p.v_threshold ? one : Spike(0);
    v[i] = lif_reset(h, p);
  }
}

template <bool decay_input, bool soft_reset>
void recompute_step(const float* x, const float* v, float* h, float* v_next, int64_t width, const LifParams& params) {
  LifParams p = params;
  p.decay_input = decay_input;
  p.soft_reset = soft_reset;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    h[i] = lif_charge(v[i], x[i], p);
    v_next[i] = lif_reset(h[i], p);
  }
}

template <Surrogate kind, bool soft_reset, bool detach_reset>
void backward_step(const float* h, const float* ds, float* dv, float* dx, int64_t width, const LifParams& params) {
  LifParams p = params;
  p.soft_reset = soft_reset;
  p.detach_reset = detach_reset;
  const float to_x = p.decay_input ? 1.0f / p.tau : 1.0f;
  const float to_v = 1.0f - 1.0f / p.tau;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float dh = lif_step_grad<kind>(h[i], ds[i], dv[i], p);
    dx[i] = dh * to_x;
    dv[i] = dh * to_v;
  }
}

// Sum of dx * d(h)/d(tau) over the row; `v` is the membrane before the charge.
template <bool decay_input>
double tau_step(const float* v, const float* x, const float* dx, int64_t width, const LifParams& params) {
  LifParams p = params;
  p.decay_input = decay_input;
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += static_cast<double>(dx[i] * lif_charge_grad_tau(v[i], x[i], p));
  return sum;
}

template <bool decay_input, bool soft_reset, typename Spike>
void forward(const LifForward& c, Spike one) {
  const int64_t blocks = (c.n + kMaxBlock - 1) / kMaxBlock;
#pragma omp parallel for schedule(static) num_threads(team(c.threads, c.steps * c.n))
  for (int64_t b = 0; b < blocks; ++b) {
    alignas(64) float buffer[kMaxBlock];
    const int64_t first = b * kMaxBlock, width = std::min(kMaxBlock, c.n - first);
    float* v = c.v_last + first;
    start(c.v0, c.params, first, width, v);
    for (int64_t t = 0; t < c.steps; ++t) {
      const int64_t at = t * c.n + first;
      const float* x = load_row(c.x, c.x_dtype, at, width, buffer);
      forward_step<decay_input, soft_reset>(x, v, static_cast<Spike*>(c.spikes) + at, one, width, c.params);
    }
  }
}

template <Surrogate kind, bool soft_reset, bool detach_reset>
void backward(const LifBackward& c) {
  const LifParams& p = c.params;
  const auto recompute = p.decay_input ? (p.soft_reset ? recompute_step<true, true> : recompute_step<true, false>)
                                       : (p.soft_reset ? recompute_step<false, true> : recompute_step<false, false>);
  // 32 KiB of h per block where T allows it.
  const int64_t block = std::clamp<int64_t>(8192 / c.steps / kMinBlock * kMinBlock, kMinBlock, kMaxBlock);
  const int64_t blocks = (c.n + block - 1) / block;
#pragma omp parallel num_threads(team(c.threads, c.steps * c.n))
  {
    const auto h = scratch(c.steps * block);
    // For dtau the membrane before each step is needed too; without it one row serves all steps.
    const auto v = scratch((c.dtau != nullptr ? c.steps + 1 : 1) * block);
    const int64_t v_stride = c.dtau != nullptr ? block : 0;
    alignas(64) float x_buffer[kMaxBlock], ds_buffer[kMaxBlock], dx_buffer[kMaxBlock], dv[kMaxBlock];
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = b * block, width = std::min(block, c.n - first);
      start(c.v0, p, first, width, v.get());
      for (int64_t t = 0; t < c.steps; ++t) {
        const int64_t at = t * c.n + first, ahead = std::min(block, c.n - first - width);
        prefetch_row(c.x, c.x_dtype, at + width, ahead);
        prefetch_row(c.ds, c.ds_dtype, at + width, ahead);
        const float* x = load_row(c.x, c.x_dtype, at, width, x_buffer);
        recompute(x, v.get() + t * v_stride, h.get() + t * block, v.get() + (t + 1) * v_stride, width, p);
      }
      if (c.dv_last != nullptr)
        std::copy(c.dv_last + first, c.dv_last + first + width, dv);
      else
        std::fill(dv, dv + width, 0.0f);
      if (c.ds == nullptr) std::fill(ds_buffer, ds_buffer + width, 0.0f);
      double dtau = 0.0;
      for (int64_t t = c.steps - 1; t >= 0; --t) {
        const int64_t at = t * c.n + first;
        const float* ds = c.ds == nullptr ? ds_buffer : load_row(c.ds, c.ds_dtype, at, width, ds_buffer);
        float* dx = row_to_write(c.dx, c.x_dtype, at, dx_buffer);
        backward_step<kind, soft_reset, detach_reset>(h.get() + t * block, ds, dv, dx, width, p);
        if (c.dtau != nullptr) {
          const float* x = load_row(c.x, c.x_dtype, at, width, x_buffer);
          dtau += p.decay_input ? p.tau * tau_step<true>(v.get() + t * block, x, dx, width, p)
                                : tau_step<false>(v.get() + t * block, x, dx, width, p);
        }
        store_row(c.dx, c.x_dtype, at, width, dx);
      }
      if (c.dv0 != nullptr) std::copy(dv, dv + width, c.dv0 + first);
      if (c.dtau != nullptr) c.dtau[b] = dtau;
    }
  }
}

template <typename Spike>
void forward_as(const LifForward& c, Spike one) {
  const LifParams& p = c.params;
  if (p.decay_input)
    p.soft_reset ? forward<true, true>(c, one) : forward<true, false>(c, one);
  else
    p.soft_reset ? forward<false, true>(c, one) : forward<false, false>(c, one);
}

template <Surrogate kind>
void backward_as(const LifBackward& c) {
  const LifParams& p = c.params;
  if (p.soft_reset)
    p.detach_reset ? backward<kind, true, true>(c) : backward<kind, true, false>(c);
  else
    p.detach_reset ? backward<kind, false, true>(c) : backward<kind, false, false>(c);
}

}  // namespace

void lif_forward(const LifForward& c) {
  switch (c.spike_dtype) {
    case Dtype::f32: return forward_as<float>(c, 1.0f);
    case Dtype::f16: return forward_as<uint16_t>(c, 0x3C00);
    case Dtype::bf16: return forward_as<uint16_t>(c, 0x3F80);
  }
}

void lif_backward(const LifBackward& c) {
  switch (c.surrogate) {
    case Surrogate::sigmoid: return backward_as<Surrogate::sigmoid>(c);
    case Surrogate::atan: return backward_as<Surrogate::atan>(c);
    case Surrogate::piecewise_quadratic: return backward_as<Surrogate::piecewise_quadratic>(c);
    case Surrogate::piecewise_exp: return backward_as<Surrogate::piecewise_exp>(c);
    case Surrogate::soft_sign: return backward_as<Surrogate::soft_sign>(c);
    case Surrogate::super_spike: return backward_as<Surrogate::super_spike>(c);
    case Surrogate::erf: return backward_as<Surrogate::erf>(c);
    case Surrogate::triangle: return backward_as<Surrogate::triangle>(c);
  }
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
