// Work that a team's threads share: each takes neighbouring items from the front of a share of its own, and when that is done,
// from the back of the fullest, so that a thread which others hold up is helped.
#pragma once

#include <stdint.h>

#include <atomic>
#include <vector>

namespace spikeclip {
namespace SPIKECLIP_ISA {

class Shares {
 public:
  struct Item {
    int64_t index;  // -1: nothing is left
    int64_t next;   // which this thread most likely takes next; -1: unknown
  };

  Shares(int64_t items, int threads) : left_(static_cast<size_t>(threads)) {
    for (int64_t i = 0; i < threads; ++i) left_[static_cast<size_t>(i)] = pack(i * items / threads, (i + 1) * items / threads);
  }

  // What thread `me` takes first, if anything: to be asked before any thread takes something.
  int64_t first(int64_t me) const { return begin(left_[static_cast<size_t>(me)]); }

  Item take(int64_t me) {
    auto& mine = left_[static_cast<size_t>(me)];
    for (uint64_t range = mine; begin(range) < end(range);) {
      const uint64_t rest = pack(begin(range) + 1, end(range));
      if (mine.compare_exchange_weak(range, rest)) return {begin(range), begin(rest) < end(rest) ? begin(rest) : -1};
    }
    for (;;) {
      std::atomic<uint64_t>* fullest = nullptr;
      uint64_t range = 0;
      for (auto& other : left_)
        if (const uint64_t now = other; end(now) - begin(now) > end(range) - begin(range)) fullest = &other, range = now;
      if (fullest == nullptr) return {-1, -1};
      const uint64_t rest = pack(begin(range), end(range) - 1);
      if (fullest->compare_exchange_weak(range, rest)) return {end(rest), begin(rest) < end(rest) ? end(rest) - 1 : -1};
    }
  }

 private:
  std::vector<std::atomic<uint64_t>> left_;  // the first item and, above it, the end of every thread's share

  static uint64_t pack(int64_t begin, int64_t end) { return static_cast<uint64_t>(end) << 32 | static_cast<uint64_t>(begin); }
  static int64_t begin(uint64_t range) { return static_cast<int64_t>(range & 0xFFFFFFFF); }
  static int64_t end(uint64_t range) { return static_cast<int64_t>(range >> 32); }
};

}  // namespace SPIKECLIP_ISA
}  // namespace spikeclip
