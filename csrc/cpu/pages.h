// Very large outputs in huge pages: a fresh tensor costs more in page faults than in computing.
#pragma once

#include <stdint.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace spikeclip {

// A hint for memory about to be written. From 32 MiB on glibc takes fresh pages for every block, unless told otherwise;
// smaller blocks it mostly reuses, and there huge pages were measured to cost more than they save.
inline void prefer_huge_pages(void* memory, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHuge = 2 << 20;
  if (bytes < (int64_t{32} << 20)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~(kHuge - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace spikeclip
