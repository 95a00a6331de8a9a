#include "kernels_headers.h"

#if RESDENSE_TARGETS
#pragma GCC target("avx2,fma,f16c")
#define RESDENSE_ISA isa_avx2
#define RESDENSE_ISA_NAME "AVX2"
#define RESDENSE_AVX2
#include "kernels.inc"
#endif
