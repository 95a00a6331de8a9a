#include <limits>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "pool.h"
#include "winograd.h"

#if defined(__x86_64__)
// After every other header, so that no shared inline function is compiled with instructions a processor may lack.
#pragma GCC target("avx2,fma,f16c")
#define RESDENSE_ISA isa_avx2
#include "sweep.inc"
#include "pool.inc"
#include "winograd.inc"
#endif
