// Compiled once per instruction set. A convolution is a product whose rows are an output pixel's window of bits.
#include "spike_conv2d.h"

#include "product.h"
#include "tap_gradient.h"
#include "weight_gradient.h"
#include "windows.h"

namespace spikeclip {
namespace SPIKECLIP_ISA {

void spike_conv2d(const SpikeConv2d& c) {
  const int64_t pixels = c.shape.batch * c.shape.out_height * c.shape.out_width;
  multiply({pixels, c.tiles, c.weights, c.scale, c.bias, c.out, c.out_dtype, c.threads}, Windows{c.shape, c.words, c.channels});
}

void spike_conv2d_grad(const SpikeConv2dGrad& c) {
  const Conv2d& s = c.shape;
  const int64_t pixels = s.batch * s.out_height * s.out_width;
  const WeightGradient call{c.columns, c.dy, c.dy_dtype, pixels, c.threads};
  if (TapGradient::fits(s)) {
    TapGradient plan(c);
    weight_gradient(call, plan);
    return plan.write();
  }
  const Windows windows{s, c.words, c.channels};
  RowGradient<Windows> plan(windows, pixels, s.kernel_height * s.kernel_width * c.channels, c.columns, c.dw);
  weight_gradient(call, plan);
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
