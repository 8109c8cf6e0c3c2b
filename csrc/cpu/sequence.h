// Calls kept to be made again, one after the other.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <functional>
#include <vector>

namespace spikeclip {

struct Sequence {
  std::vector<std::function<void(int threads)>> steps;

  void run(int threads) const {
    for (const auto& step : steps) step(threads);
  }
};

// x [steps, batch, tokens, channels] to [batch, channels]: means over the tokens, summed over the steps by their weights.
inline void weighted_mean(const float* x, const float* weights, int64_t steps, int64_t batch, int64_t tokens, int64_t channels,
                          float* out) {
  std::vector<float> sums(static_cast<size_t>(channels));
  std::fill_n(out, batch * channels, 0.0f);
  for (int64_t t = 0; t < steps; ++t)
    for (int64_t b = 0; b < batch; ++b) {
      const float* rows = x + (t * batch + b) * tokens * channels;
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t n = 0; n < tokens; ++n)
        for (int64_t c = 0; c < channels; ++c) sums[c] += rows[n * channels + c];
      const float weight = weights[t] / static_cast<float>(tokens);
      for (int64_t c = 0; c < channels; ++c) out[b * channels + c] += weight * sums[c];
    }
}

}  // namespace spikeclip
