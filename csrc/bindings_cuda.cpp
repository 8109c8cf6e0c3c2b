// Python module spikeclip._cuda: the table of functions; the caller has made x's device current.
#include <pybind11/pybind11.h>

#include "cuda/lif.cuh"

namespace py = pybind11;
using namespace spikeclip;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void lif_fwd(uintptr_t x, int x_dtype, uintptr_t v0, uintptr_t spikes, int spike_dtype, uintptr_t v_last, int64_t steps,
             int64_t n, float tau, uintptr_t tau_pointer, float v_threshold, float v_reset, bool decay_input,
             bool soft_reset, uintptr_t stream) {
  lif_forward({at<void>(x), Dtype(x_dtype), at<float>(v0), at<void>(spikes), Dtype(spike_dtype), at<float>(v_last),
               steps, n, at<float>(tau_pointer),
               LifParams{tau, v_threshold, v_reset, 1.0f, decay_input, soft_reset, false}},
              at<void>(stream));
}

void lif_bwd(uintptr_t ds, int ds_dtype, uintptr_t dv_last, uintptr_t x, int x_dtype, uintptr_t v0, uintptr_t dx,
             uintptr_t dv0, uintptr_t dtau, int64_t steps, int64_t n, float tau, uintptr_t tau_pointer,
             float v_threshold, float v_reset, bool decay_input, bool soft_reset, bool detach_reset, int surrogate,
             float alpha, uintptr_t stream) {
  lif_backward({at<void>(ds), Dtype(ds_dtype), at<float>(dv_last), at<void>(x), Dtype(x_dtype), at<float>(v0),
                at<void>(dx), at<float>(dv0), at<double>(dtau), steps, n, at<float>(tau_pointer),
                LifParams{tau, v_threshold, v_reset, alpha, decay_input, soft_reset, detach_reset}, Surrogate(surrogate)},
               at<void>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("lif_fwd", &lif_fwd);
  m.def("lif_bwd", &lif_bwd);
  m.def("tau_partials", &tau_partials);
  m.def("archs", [] { return SPIKECLIP_CUDA_ARCHS; }, "Compute capabilities this module was compiled for.");
}
