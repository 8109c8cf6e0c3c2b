// Python module spikeclip._cuda: the table of functions; the caller has made x's device current.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "cuda/bn_lif.cuh"
#include "cuda/lif.cuh"
#include "cuda/pack.cuh"
#include "cuda/spike_attention.cuh"
#include "cuda/spike_conv2d.cuh"

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

void bn_sums(uintptr_t x, int x_dtype, uintptr_t sums, int64_t rows, int64_t channels, int64_t parts, uintptr_t stream) {
  bn_stats({at<void>(x), Dtype(x_dtype), at<float>(sums), rows, channels, parts}, at<void>(stream));
}

// spike_dtype 3: packed
void bn_lif_fwd(uintptr_t x, int x_dtype, uintptr_t v0, uintptr_t scale, uintptr_t shift, uintptr_t spikes, int spike_dtype,
                uintptr_t v_last, int64_t steps, int64_t rows, int64_t channels, float tau, uintptr_t tau_pointer,
                float v_threshold, float v_reset, bool decay_input, bool soft_reset, uintptr_t stream) {
  const bool packed = spike_dtype == 3;
  bn_lif_forward({at<void>(x), Dtype(x_dtype), at<float>(v0), at<float>(scale), at<float>(shift), at<void>(spikes), packed,
                  packed ? Dtype::f32 : Dtype(spike_dtype), at<float>(v_last), steps, rows, channels, at<float>(tau_pointer),
                  LifParams{tau, v_threshold, v_reset, 1.0f, decay_input, soft_reset, false}},
                 at<void>(stream));
}

void bn_lif_bwd(uintptr_t ds, int ds_dtype, uintptr_t x, int x_dtype, uintptr_t scale, uintptr_t shift, uintptr_t mean,
                uintptr_t factors, uintptr_t dx, uintptr_t sums, int64_t steps, int64_t rows, int64_t channels, int64_t parts,
                float tau, float v_threshold, float v_reset, bool decay_input, bool soft_reset, bool detach_reset,
                int surrogate, float alpha, uintptr_t stream) {
  bn_lif_backward({at<void>(ds), Dtype(ds_dtype), at<void>(x), Dtype(x_dtype), at<float>(scale), at<float>(shift),
                   at<float>(mean), at<float>(factors), at<void>(dx), at<float>(sums), steps, rows, channels, parts,
                   LifParams{tau, v_threshold, v_reset, alpha, decay_input, soft_reset, detach_reset}, Surrogate(surrogate)},
                  at<void>(stream));
}

PackCall pack_call(uintptr_t s, int dtype, uintptr_t words, int64_t rows, int64_t length, uintptr_t flag) {
  return {at<void>(s), SpikeDtype(dtype), at<uint32_t>(words), rows, length, at<int32_t>(flag)};
}

ConvShape conv_shape(const std::array<int, 10>& s) { return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9]}; }

void product(uintptr_t words, const std::array<int, 10>& shape, int m, int n, int channels, uintptr_t w, int w_dtype,
             const std::array<int64_t, 3>& strides, uintptr_t scale, uintptr_t bias, uintptr_t y, int y_dtype,
             uintptr_t stream) {
  spike_product({at<uint32_t>(words), conv_shape(shape), m, n, channels, at<void>(w), WeightDtype(w_dtype), strides[0],
                 strides[1], strides[2], at<float>(scale), at<float>(bias), at<void>(y), Dtype(y_dtype)},
                at<void>(stream));
}

void gradient(uintptr_t words, const std::array<int, 10>& shape, int m, int n, int channels, uintptr_t dy, int dy_dtype,
              const std::array<int64_t, 4>& strides, uintptr_t dw, int splits, uintptr_t stream) {
  spike_gradient({at<uint32_t>(words), conv_shape(shape), m, n, channels, at<void>(dy), Dtype(dy_dtype), strides[0],
                  strides[1], strides[2], strides[3], at<float>(dw), splits},
                 at<void>(stream));
}

// words, words a row, first bit
using SpikeRows = std::tuple<uintptr_t, int, int>;

Spikes spikes(const SpikeRows& s) { return {at<uint32_t>(std::get<0>(s)), std::get<1>(s), std::get<2>(s)}; }

void attention(int64_t sequences, int heads, int width, int n, int s, const SpikeRows& q, const SpikeRows& k, const SpikeRows& v,
               uintptr_t y, int y_dtype, float scale, uintptr_t stream) {
  spike_attention({{sequences, heads, width}, n, s, spikes(q), spikes(k), spikes(v), at<void>(y), Dtype(y_dtype), scale},
                  at<void>(stream));
}

void gram(int64_t sequences, int heads, int width, int rows, const SpikeRows& a, const SpikeRows& b, uintptr_t dense,
          int dense_dtype, uintptr_t out, uintptr_t stream) {
  head_gram({{sequences, heads, width}, rows, spikes(a), spikes(b), at<void>(dense), Dtype(dense_dtype), at<float>(out)},
            at<void>(stream));
}

void apply(int64_t sequences, int heads, int width, int rows, const SpikeRows& a, uintptr_t dense, int dense_dtype,
           uintptr_t matrix, bool transposed, uintptr_t y, int y_row, int y_dtype, float scale, uintptr_t stream) {
  head_apply({{sequences, heads, width}, rows, spikes(a), at<void>(dense), Dtype(dense_dtype), at<float>(matrix), transposed,
              at<void>(y), y_row, Dtype(y_dtype), scale},
             at<void>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("lif_fwd", &lif_fwd);
  m.def("lif_bwd", &lif_bwd);
  m.def("tau_partials", &tau_partials);
  m.def("bn_parts", &bn_parts);
  m.def("bn_sums", &bn_sums);
  m.def("bn_lif_fwd", &bn_lif_fwd);
  m.def("bn_lif_bwd", &bn_lif_bwd);
  m.def("pack", [](uintptr_t s, int dtype, uintptr_t words, int64_t rows, int64_t length, uintptr_t flag, uintptr_t stream) {
    pack(pack_call(s, dtype, words, rows, length, flag), at<void>(stream));
  });
  m.def("unpack", [](uintptr_t words, uintptr_t s, int dtype, int64_t rows, int64_t length, uintptr_t stream) {
    unpack(pack_call(s, dtype, words, rows, length, 0), at<void>(stream));
  });
  m.def("spike_product", &product);
  m.def("spike_gradient", &gradient);
  m.def("gradient_splits", &gradient_splits);
  m.def("spike_attention", &attention);
  m.def("head_gram", &gram);
  m.def("head_apply", &apply);
  m.def("archs", [] { return SPIKECLIP_CUDA_ARCHS; }, "Compute capabilities this module was compiled for.");
}
