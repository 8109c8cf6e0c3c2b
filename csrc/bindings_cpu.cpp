// Python module spikeclip._cpu: the table of functions, and the choice of instruction set.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/bn_lif.h"
#include "cpu/dense_product.h"
#include "cpu/lif.h"
#include "cpu/max_pool.h"
#include "cpu/pack.h"
#include "cpu/pages.h"
#include "cpu/sequence.h"
#include "cpu/spike_attention.h"
#include "cpu/spike_conv2d.h"
#include "cpu/spike_lif.h"
#include "cpu/spike_matmul.h"
#include "cpu/winograd.h"

namespace py = pybind11;
using namespace spikeclip;

namespace {

struct Isa {
  const char* name;
  bool supported;
  void (*lif_forward)(const LifForward&);
  void (*lif_backward)(const LifBackward&);
  void (*bn_stats)(const BnStats&);
  void (*bn_lif_backward)(const BnLifBackward&);
  void (*bn_dx)(const BnDx&);
  void (*max_pool)(const MaxPool&);
  void (*max_pool_grad)(const MaxPoolGrad&);
  bool (*pack)(const Pack&);
  void (*unpack)(const Pack&);
  int64_t (*count)(const uint32_t*, int64_t);
  void (*tile_weights)(const TileWeights&);
  void (*spike_matmul)(const SpikeMatmul&);
  void (*spike_matmul_grad)(const SpikeMatmulGrad&);
  void (*spike_conv2d)(const SpikeConv2d&);
  void (*spike_conv2d_grad)(const SpikeConv2dGrad&);
  void (*dense_product)(const DenseProduct&);
  void (*winograd_gradient)(const WinogradGradient&);
  void (*spike_lif)(const SpikeLif&);
  void (*spike_attention)(const SpikeAttention&);
  void (*spike_attention_grad)(const SpikeAttentionGrad&);
  void (*spike_attention_lif)(const SpikeAttentionLif&);
};

#define SPIKECLIP_ROW(isa, supported)                                                                                      \
  {                                                                                                                        \
    #isa, supported, isa::lif_forward, isa::lif_backward, isa::bn_stats, isa::bn_lif_backward, isa::bn_dx, isa::max_pool,  \
        isa::max_pool_grad, isa::pack, isa::unpack, isa::count, isa::tile_weights, isa::spike_matmul,                      \
        isa::spike_matmul_grad, isa::spike_conv2d, isa::spike_conv2d_grad, isa::dense_product, isa::winograd_gradient,     \
        isa::spike_lif, isa::spike_attention, isa::spike_attention_grad, isa::spike_attention_lif                          \
  }

// Widest last.
std::vector<Isa> table() {
  std::vector<Isa> rows{SPIKECLIP_ROW(baseline, true)};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                        __builtin_cpu_supports("bmi");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  rows.push_back(SPIKECLIP_ROW(avx2, has_avx2));
  rows.push_back(SPIKECLIP_ROW(avx512, has_avx512));
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
                       LifParams{tau, v_threshold, v_reset, 1.0f, decay_input, soft_reset, false}, threads, false, 0,
                       false, nullptr, nullptr});
}

void bn_stats(uintptr_t x, int x_dtype, int64_t rows, int64_t channels, uintptr_t mean, uintptr_t var, int threads) {
  check_sizes(rows, channels, threads);
  current.bn_stats({at<void>(x), Dtype(x_dtype), rows, channels, at<float>(mean), at<float>(var), threads});
}

// spike_dtype 3: packed
LifForward bn_lif_fwd(uintptr_t x, int x_dtype, uintptr_t v0, uintptr_t scale, uintptr_t shift, uintptr_t spikes, int spike_dtype,
                      uintptr_t v_last, int64_t steps, int64_t rows, int64_t channels, float tau, uintptr_t, float v_threshold,
                      float v_reset, bool decay_input, bool soft_reset, bool repeated, int threads) {
  check_sizes(steps, rows * channels, threads);
  const bool packed = spike_dtype == 3;
  const Dtype dtype = packed ? Dtype::f32 : Dtype(spike_dtype);
  if (!packed) prefer_huge_pages(at<void>(spikes), bytes(steps * rows * channels, spike_dtype));
  return {at<void>(x), Dtype(x_dtype), at<float>(v0), at<void>(spikes), dtype, at<float>(v_last), steps, rows * channels,
          LifParams{tau, v_threshold, v_reset, 1.0f, decay_input, soft_reset, false}, threads, packed, channels, repeated,
          at<float>(scale), at<float>(shift)};
}

void bn_lif_bwd(uintptr_t ds, int ds_dtype, uintptr_t x, int x_dtype, uintptr_t scale, uintptr_t shift, uintptr_t mean,
                uintptr_t factors, uintptr_t dx, uintptr_t sums, int64_t steps, int64_t rows, int64_t channels, float tau,
                float v_threshold, float v_reset, bool decay_input, bool soft_reset, bool detach_reset, int surrogate,
                float alpha, int threads) {
  check_sizes(steps, rows * channels, threads);
  if (dx != 0) prefer_huge_pages(at<void>(dx), bytes(steps * rows * channels, x_dtype));
  current.bn_lif_backward({at<void>(ds), Dtype(ds_dtype), at<void>(x), Dtype(x_dtype), at<float>(scale), at<float>(shift),
                           at<float>(mean), at<float>(factors), at<void>(dx), at<float>(sums), steps, rows, channels,
                           LifParams{tau, v_threshold, v_reset, alpha, decay_input, soft_reset, detach_reset},
                           Surrogate(surrogate), threads});
}

void bn_dx(uintptr_t dz, uintptr_t x, int dtype, uintptr_t factors, int64_t rows, int64_t channels, int threads) {
  check_sizes(rows, channels, threads);
  current.bn_dx({at<void>(dz), at<void>(x), Dtype(dtype), at<float>(factors), rows, channels, threads});
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

// images, height, width, channels, out height and width, size, stride, padding
PoolShape pool_shape(const std::array<int64_t, 9>& s) { return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8]}; }

void max_pool(uintptr_t x, int dtype, const std::array<int64_t, 9>& shape, uintptr_t scale, uintptr_t values, uintptr_t index,
              int threads) {
  const PoolShape s = pool_shape(shape);
  check_sizes(s.images * s.out_height * s.out_width, s.channels, threads);
  current.max_pool({s, at<void>(x), Dtype(dtype), at<float>(scale), at<void>(values), at<uint8_t>(index), threads});
}

void max_pool_grad(uintptr_t dvalues, uintptr_t index, uintptr_t x, int dtype, const std::array<int64_t, 9>& shape,
                   uintptr_t factors, uintptr_t dx, int threads) {
  const PoolShape s = pool_shape(shape);
  check_sizes(s.images * s.out_height * s.out_width, s.channels, threads);
  prefer_huge_pages(at<void>(dx), bytes(s.images * s.height * s.width * s.channels, dtype));
  current.max_pool_grad(
      {s, at<void>(dvalues), at<uint8_t>(index), at<void>(x), Dtype(dtype), at<float>(factors), at<void>(dx), threads});
}

bool pack(uintptr_t spikes, int dtype, uintptr_t words, int64_t rows, int64_t length, int threads) {
  check_sizes(rows, length, threads);
  return current.pack({at<void>(spikes), Dtype(dtype), at<uint32_t>(words), rows, length, threads});
}

void unpack(uintptr_t words, uintptr_t spikes, int dtype, int64_t rows, int64_t length, int threads) {
  check_sizes(rows, length, threads);
  current.unpack({at<void>(spikes), Dtype(dtype), at<uint32_t>(words), rows, length, threads});
}

int64_t count(uintptr_t words, int64_t number) { return current.count(at<uint32_t>(words), number); }

Tiles tiles(int kind, int64_t length, int64_t columns, int64_t tap) {
  check_sizes(length, columns, 1);
  if (tap < 1 || length % tap != 0) throw std::invalid_argument("length must be a multiple of tap");
  return {WeightKind(kind), length, columns, tap};
}

int64_t tile_bytes(int kind, int64_t length, int64_t columns, int64_t tap) { return tiles(kind, length, columns, tap).bytes(); }

void tile_weights(uintptr_t weights, int dtype, std::array<int64_t, 2> strides, int kind, int64_t length, int64_t columns,
                  int64_t tap, uintptr_t out, int threads) {
  current.tile_weights({tiles(kind, length, columns, tap), at<void>(weights), Dtype(dtype), strides[0], strides[1], at<void>(out),
                        threads});
}

void spike_matmul(uintptr_t words, int64_t rows, int kind, int64_t length, int64_t columns, uintptr_t weights,
                  uintptr_t scale, uintptr_t bias, uintptr_t out, int out_dtype, int threads) {
  check_sizes(rows, length, threads);
  prefer_huge_pages(at<void>(out), bytes(rows * columns, out_dtype));
  current.spike_matmul({at<uint32_t>(words), rows, tiles(kind, length, columns, length), at<void>(weights), at<float>(scale),
                        at<float>(bias), at<void>(out), Dtype(out_dtype), threads});
}

void spike_matmul_grad(uintptr_t words, int64_t rows, int64_t length, int64_t columns, uintptr_t dy, int dy_dtype,
                       uintptr_t dw, int threads) {
  check_sizes(rows, length, threads);
  current.spike_matmul_grad(
      {at<uint32_t>(words), rows, length, columns, at<void>(dy), Dtype(dy_dtype), at<float>(dw), threads});
}

// batch, height, width, out height and width, kernel, stride and padding, each height first
using Conv2dShape = std::array<int64_t, 11>;

Conv2d conv2d(const Conv2dShape& s) { return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10]}; }

void spike_conv2d(uintptr_t words, const Conv2dShape& shape, int kind, int64_t channels, int64_t columns,
                  uintptr_t weights, uintptr_t scale, uintptr_t bias, uintptr_t out, int out_dtype, int threads) {
  const Conv2d s = conv2d(shape);
  check_sizes(s.batch * s.out_height * s.out_width, s.height * s.width, threads);
  prefer_huge_pages(at<void>(out), bytes(s.batch * s.out_height * s.out_width * columns, out_dtype));
  current.spike_conv2d({s, at<uint32_t>(words), channels,
                        tiles(kind, s.kernel_height * s.kernel_width * channels, columns, channels), at<void>(weights),
                        at<float>(scale), at<float>(bias), at<void>(out), Dtype(out_dtype), threads});
}

void spike_conv2d_grad(uintptr_t words, const Conv2dShape& shape, int64_t channels, int64_t columns, uintptr_t dy,
                       int dy_dtype, uintptr_t dw, int threads) {
  check_sizes(channels, columns, threads);
  current.spike_conv2d_grad(
      {conv2d(shape), at<uint32_t>(words), channels, columns, at<void>(dy), Dtype(dy_dtype), at<float>(dw), threads});
}

void dense_product(uintptr_t x, int x_dtype, int64_t rows, int64_t depth, uintptr_t w, int64_t columns, uintptr_t out,
                   int out_dtype, int threads) {
  check_sizes(rows, depth * columns, threads);
  prefer_huge_pages(at<void>(out), bytes(rows * columns, out_dtype));
  current.dense_product(
      {rows, depth, columns, at<void>(x), Dtype(x_dtype), at<float>(w), at<void>(out), Dtype(out_dtype), threads});
}

// Of a 3x3 convolution of stride 1
void winograd_gradient(uintptr_t dy, int dtype, const Conv2dShape& shape, int64_t channels, int64_t columns, uintptr_t w,
                       uintptr_t dx, int threads) {
  const Conv2d s = conv2d(shape);
  check_sizes(s.batch * s.height * s.width, channels * columns, threads);
  prefer_huge_pages(at<void>(dx), bytes(s.batch * s.height * s.width * channels, dtype));
  current.winograd_gradient({s.batch, s.height, s.width, channels, s.out_height, s.out_width, columns, s.pad_height, s.pad_width,
                             at<void>(dy), at<float>(w), at<void>(dx), Dtype(dtype), threads});
}

// `pool`: size, stride, padding, height and width of what it leaves
SpikeLif spike_lif(uintptr_t words, int64_t steps, const Conv2dShape& shape, bool convolution, int64_t channels, int kind,
                   int64_t columns, uintptr_t weights, uintptr_t scale, uintptr_t bias, const std::array<int64_t, 5>& pool,
                   uintptr_t add, uintptr_t currents, uintptr_t out, float tau, float v_threshold, float v_reset,
                   bool decay_input, bool soft_reset, int threads) {
  const Conv2d s = conv2d(shape);
  check_sizes(steps, s.batch * s.out_height * s.out_width, threads);
  return {steps, s, convolution, at<uint32_t>(words), channels,
          tiles(kind, s.kernel_height * s.kernel_width * channels, columns, channels), at<void>(weights), at<float>(scale),
          at<float>(bias), pool[0], pool[1], pool[2], pool[3], pool[4], at<float>(add), at<float>(currents), at<uint32_t>(out),
          LifParams{tau, v_threshold, v_reset, 1.0f, decay_input, soft_reset, false}, threads};
}

// images, q tokens, k tokens, channels, heads
using AttentionShape = std::array<int64_t, 5>;

SpikeAttention attention(const std::array<uintptr_t, 3>& qkv, const AttentionShape& s, bool together, float scale, uintptr_t out,
                         int dtype, int threads) {
  check_sizes(s[0] * s[1] * s[2], s[3] * s[4], threads);
  return {at<uint32_t>(qkv[0]), at<uint32_t>(qkv[1]), at<uint32_t>(qkv[2]), s[0], s[1], s[2], s[3], s[4], together, scale,
          at<void>(out), Dtype(dtype), threads};
}

void spike_attention(const std::array<uintptr_t, 3>& qkv, const AttentionShape& shape, bool together, float scale,
                     uintptr_t out, int dtype, int threads) {
  prefer_huge_pages(at<void>(out), bytes(shape[0] * shape[1] * shape[3], dtype));
  current.spike_attention(attention(qkv, shape, together, scale, out, dtype, threads));
}

void spike_attention_grad(const std::array<uintptr_t, 3>& qkv, const AttentionShape& shape, bool together, float scale,
                          uintptr_t dy, int dtype, const std::array<uintptr_t, 3>& gradients, int threads) {
  current.spike_attention_grad({attention(qkv, shape, together, scale, dy, dtype, threads), at<void>(gradients[0]),
                                at<void>(gradients[1]), at<void>(gradients[2])});
}

SpikeAttentionLif spike_attention_lif(const std::array<uintptr_t, 3>& qkv, const AttentionShape& shape, bool together,
                                      float scale, int64_t steps, uintptr_t words, float tau, float v_threshold, float v_reset,
                                      bool decay_input, bool soft_reset, int threads) {
  if (steps < 1 || shape[0] % steps != 0) throw std::invalid_argument("images must be a multiple of steps");
  return {attention(qkv, shape, together, scale, 0, 0, threads), steps, at<uint32_t>(words),
          LifParams{tau, v_threshold, v_reset, 1.0f, decay_input, soft_reset, false}};
}

void mean(Sequence& sequence, uintptr_t x, uintptr_t weights, const std::array<int64_t, 4>& shape, uintptr_t out) {
  check_sizes(shape[0] * shape[1], shape[2] * shape[3], 1);
  sequence.steps.emplace_back([=](int) {
    weighted_mean(at<float>(x), at<float>(weights), shape[0], shape[1], shape[2], shape[3], at<float>(out));
  });
}

LifForward by(LifForward call, int threads) { return call.threads = threads, call; }
SpikeLif by(SpikeLif call, int threads) { return call.threads = threads, call; }
SpikeAttentionLif by(SpikeAttentionLif call, int threads) { return call.forward.threads = threads, call; }

// The call that `describe` makes of its arguments: made at once, or kept in a sequence.
template <typename Call, typename... Args>
auto now(Call (*describe)(Args...), void (*Isa::*function)(const Call&)) {
  return [=](Args... args) { (current.*function)(describe(args...)); };
}

template <typename Call, typename... Args>
auto later(Call (*describe)(Args...), void (*Isa::*function)(const Call&)) {
  return [=](Sequence& sequence, Args... args) {
    sequence.steps.emplace_back([function, call = describe(args...)](int threads) { (current.*function)(by(call, threads)); });
  };
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def("lif_fwd", &lif_fwd, no_gil);
  m.def("lif_bwd", &lif_bwd, no_gil);
  m.def("bn_stats", &bn_stats, no_gil);
  m.def("bn_lif_fwd", now(&bn_lif_fwd, &Isa::lif_forward), no_gil);
  m.def("bn_lif_bwd", &bn_lif_bwd, no_gil);
  m.def("bn_dx", &bn_dx, no_gil);
  m.def("tau_partials", &tau_partials);
  m.def("max_pool", &max_pool, no_gil);
  m.def("max_pool_grad", &max_pool_grad, no_gil);
  m.def("pack", &pack, no_gil, "False: a value is neither 0 nor 1.");
  m.def("unpack", &unpack, no_gil);
  m.def("count", &count, no_gil);
  m.def("tile_bytes", &tile_bytes);
  m.def("tile_weights", &tile_weights, no_gil);
  m.def("spike_matmul", &spike_matmul, no_gil);
  m.def("spike_matmul_grad", &spike_matmul_grad, no_gil);
  m.def("spike_conv2d", &spike_conv2d, no_gil);
  m.def("spike_conv2d_grad", &spike_conv2d_grad, no_gil);
  m.def("dense_product", &dense_product, no_gil);
  m.def("winograd_gradient", &winograd_gradient, no_gil);
  m.def("spike_lif", now(&spike_lif, &Isa::spike_lif), no_gil);
  m.def("spike_attention", &spike_attention, no_gil);
  m.def("spike_attention_grad", &spike_attention_grad, no_gil);
  m.def("spike_attention_lif", now(&spike_attention_lif, &Isa::spike_attention_lif), no_gil);
  py::class_<Sequence>(m, "Sequence")
      .def(py::init<>())
      .def("spike_lif", later(&spike_lif, &Isa::spike_lif))
      .def("spike_attention_lif", later(&spike_attention_lif, &Isa::spike_attention_lif))
      .def("bn_lif_fwd", later(&bn_lif_fwd, &Isa::lif_forward))
      .def("mean", &mean)
      .def("run", &Sequence::run, no_gil);
  m.def("isa", [] { return current.name; });
  m.def("isas", &supported, "Instruction sets that this machine can run, widest last.");
  m.def("set_isa", &set_isa);
}
