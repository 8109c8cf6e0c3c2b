// Python module spikeclip._cpu: the table of functions, and the choice of instruction set.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/lif.h"
#include "cpu/pages.h"

namespace py = pybind11;
using namespace spikeclip;

namespace {

struct Isa {
  const char* name;
  bool supported;
  void (*lif_forward)(const LifForward&);
  void (*lif_backward)(const LifBackward&);
};

// Widest last.
std::vector<Isa> table() {
  std::vector<Isa> rows{{"baseline", true, baseline::lif_forward, baseline::lif_backward}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  rows.push_back({"avx2", has_avx2, avx2::lif_forward, avx2::lif_backward});
  rows.push_back({"avx512", has_avx512, avx512::lif_forward, avx512::lif_backward});
#endif
  return rows;
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> rows = table();
  return rows;
}

std::vector<std::string> supported() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.supported) names.emplace_back(isa.name);
  return names;
}

Isa current = [] {
  Isa best = isas().front();
  for (const Isa& isa : isas())
    if (isa.supported) best = isa;
  return best;
}();

void set_isa(const std::string& name) {
  for (const Isa& isa : isas())
    if (isa.supported && name == isa.name) {
      current = isa;
      return;
    }
  std::string message = "instruction set must be one of";
  for (const std::string& known : supported()) message += " " + known;
  throw std::invalid_argument(message + " on this machine; got '" + name + "'");
}

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

int64_t bytes(int64_t elements, int dtype) { return elements * (Dtype(dtype) == Dtype::f32 ? 4 : 2); }

void check_sizes(int64_t steps, int64_t n, int threads) {
  if (steps < 1 || n < 1 || threads < 1) throw std::invalid_argument("steps, n and threads must be >= 1");
}

void lif_fwd(uintptr_t x, int x_dtype, uintptr_t v0, uintptr_t spikes, int spike_dtype, uintptr_t v_last, int64_t steps,
             int64_t n, float tau, uintptr_t, float v_threshold, float v_reset, bool decay_input, bool soft_reset,
             int threads) {
  check_sizes(steps, n, threads);
  prefer_huge_pages(at<void>(spikes), bytes(steps * n, spike_dtype));
  current.lif_forward({at<void>(x), Dtype(x_dtype), at<float>(v0), at<void>(spikes), Dtype(spike_dtype),
                       at<float>(v_last), steps, n,
                       LifParams{tau, v_threshold, v_reset, 1.0f, decay_input, soft_reset, false}, threads});
}

void lif_bwd(uintptr_t ds, int ds_dtype, uintptr_t dv_last, uintptr_t x, int x_dtype, uintptr_t v0, uintptr_t dx,
             uintptr_t dv0, uintptr_t dtau, int64_t steps, int64_t n, float tau, uintptr_t, float v_threshold,
             float v_reset, bool decay_input, bool soft_reset, bool detach_reset, int surrogate, float alpha,
             int threads) {
  check_sizes(steps, n, threads);
  prefer_huge_pages(at<void>(dx), bytes(steps * n, x_dtype));
  current.lif_backward({at<void>(ds), Dtype(ds_dtype), at<float>(dv_last), at<void>(x), Dtype(x_dtype), at<float>(v0),
                        at<void>(dx), at<float>(dv0), at<double>(dtau), steps, n,
                        LifParams{tau, v_threshold, v_reset, alpha, decay_input, soft_reset, detach_reset},
                        Surrogate(surrogate), threads});
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def("lif_fwd", &lif_fwd, no_gil);
  m.def("lif_bwd", &lif_bwd, no_gil);
  m.def("tau_partials", &tau_partials);
  m.def("isa", [] { return current.name; });
  m.def("isas", &supported, "Instruction sets that this machine can run, widest last.");
  m.def("set_isa", &set_isa);
}
