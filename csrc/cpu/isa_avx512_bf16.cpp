#include "kernels_headers.h"

#if RESDENSE_TARGETS
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#define RESDENSE_ISA isa_avx512_bf16
#define RESDENSE_ISA_NAME "AVX512_BF16"
#define RESDENSE_AVX512
#define RESDENSE_AVX512_BF16
#define RESDENSE_AVX2
#include "kernels.inc"
#endif
