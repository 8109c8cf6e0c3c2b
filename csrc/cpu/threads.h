// Which thread runs, of how many, without OpenMP's header.
#pragma once

extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();

namespace spikeclip {

inline int thread_index() { return omp_get_thread_num(); }
inline int team_size() { return omp_get_num_threads(); }

}  // namespace spikeclip
