// The instruction sets that every file of this folder is compiled for, widest last.
#pragma once

// Declares the functions given once in each instruction set's namespace.
#if defined(__x86_64__)
#define SPIKECLIP_FOR_EVERY_ISA(...)    \
  namespace baseline { __VA_ARGS__ }    \
  namespace avx2 { __VA_ARGS__ }        \
  namespace avx512 { __VA_ARGS__ }
#else
#define SPIKECLIP_FOR_EVERY_ISA(...) \
  namespace baseline { __VA_ARGS__ }
#endif
