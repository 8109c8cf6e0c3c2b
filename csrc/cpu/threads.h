// Which thread of the team runs, without OpenMP's header.
#pragma once

extern "C" int omp_get_thread_num();

namespace spikeclip {

inline int thread_index() { return omp_get_thread_num(); }

}  // namespace spikeclip
