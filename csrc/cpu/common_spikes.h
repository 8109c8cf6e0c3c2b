// What several time-steps have in common: a neuron that fires at steps 0 and 2 names the same line of weights twice. Its spikes
// are taken out of both steps into a row of bits of their own, whose lines are added up once and whose sum goes to both.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <array>
#include <vector>

namespace spikeclip {
namespace SPIKECLIP_ISA {

constexpr int64_t kTogether = 4;  // neighbouring steps that may have spikes in common
constexpr int kSets = 1 << kTogether;

// A set of steps, bit i: step first + i.
struct Common {
  int64_t first;
  unsigned steps;

  bool has(int64_t t) const { return t >= first && t < first + kTogether && (steps >> (t - first) & 1) != 0; }
};

// How often exactly the steps of each set fire together, among words of `steps` rows `stride` words apart, evenly spaced but for
// a drift, so that they are not the same channels' every time.
inline std::array<int64_t, kSets> sets_of(const uint32_t* words, int64_t steps, int64_t stride, int64_t sampled) {
  std::array<int64_t, kSets> found{};
  const int64_t every = std::max<int64_t>(1, stride / sampled);
  for (int64_t i = 0; i < sampled; ++i) {
    uint32_t exactly[kSets] = {~uint32_t{0}};  // neurons that fire at the steps of a set, and at no other of those seen so far
    for (int64_t t = 0; t < steps; ++t) {
      const uint32_t word = words[t * stride + i * every + i % every];
      for (int set = 0; set < 1 << t; ++set) {
        exactly[set | 1 << t] = exactly[set] & word;
        exactly[set] &= ~word;
      }
    }
    for (int set = 1; set < 1 << steps; ++set) found[set] += __builtin_popcount(exactly[set]);
  }
  return found;
}

// Larger sets first, so that each takes what smaller ones would take part of.
inline bool larger(unsigned a, unsigned b) { return __builtin_popcount(a) > __builtin_popcount(b); }

// The sets of steps that are worth a row of their own, which costs `row_lines` lines beside its own. A product's row has the
// lines of `words_each` words.
inline std::vector<Common> choose_common(const uint32_t* words, int64_t steps, int64_t stride, int64_t words_each, double row_lines) {
  std::vector<Common> all;
  for (int64_t first = 0; stride > 0 && first + 1 < steps; first += kTogether) {
    const int64_t group = std::min(kTogether, steps - first), sampled = std::min(stride, std::clamp<int64_t>(stride / 16, 32, 512));
    const auto found = sets_of(words + first * stride, group, stride, sampled);
    const double lines_each = static_cast<double>(words_each) / static_cast<double>(sampled);
    int64_t repeated = 0;
    for (unsigned set = 1; set < 1u << group; ++set) repeated += found[set] * (__builtin_popcount(set) - 1);
    if (static_cast<double>(repeated) * lines_each <= row_lines) continue;  // as for most sparse layers
    const auto lines = [&](const std::vector<unsigned>& chosen) {
      int64_t count = 0;
      for (unsigned set = 1; set < 1u << group; ++set) {
        unsigned left = set;
        int64_t rows = 0;
        for (unsigned common : chosen)
          if ((left & common) == common) left &= ~common, ++rows;
        count += found[set] * (rows + __builtin_popcount(left));
      }
      return static_cast<double>(count) * lines_each + row_lines * static_cast<double>(chosen.size());
    };
    std::vector<unsigned> chosen;
    for (double least = lines(chosen);;) {
      std::vector<unsigned> best = chosen;
      for (unsigned set = 1; set < 1u << group; ++set) {
        if (__builtin_popcount(set) < 2 || std::find(chosen.begin(), chosen.end(), set) != chosen.end()) continue;
        std::vector<unsigned> more = chosen;
        more.insert(std::upper_bound(more.begin(), more.end(), set, larger), set);
        if (const double now = lines(more); now < least) least = now, best = more;
      }
      if (best.size() == chosen.size()) break;
      chosen = best;
    }
    for (unsigned set : chosen) all.push_back({first, set});
  }
  return all;
}

// words [steps, stride] -> out [steps + common, stride]: each step's spikes but those it has in common, then these.
inline void take_apart(const uint32_t* words, int64_t steps, int64_t stride, const std::vector<Common>& common, int threads,
                       uint32_t* out) {
  constexpr int64_t kChunk = 512;
#pragma omp parallel for schedule(static) num_threads(steps* stride < (1 << 14) ? 1 : threads)
  for (int64_t first = 0; first < stride; first += kChunk) {
    const int64_t count = std::min(kChunk, stride - first);
    for (int64_t t = 0; t < steps; ++t) memcpy(out + t * stride + first, words + t * stride + first, static_cast<size_t>(count) * 4);
    for (size_t n = 0; n < common.size(); ++n) {
      uint32_t* shared = out + (steps + static_cast<int64_t>(n)) * stride + first;
      std::fill(shared, shared + count, ~uint32_t{0});
      const auto each = [&](auto f) {
        for (int64_t t = common[n].first; t < steps; ++t)
          if (common[n].has(t)) f(out + t * stride + first);
      };
      each([&](const uint32_t* step) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) shared[i] &= step[i];
      });
      each([&](uint32_t* step) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) step[i] &= ~shared[i];
      });
    }
  }
}

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
