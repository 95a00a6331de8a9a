#include <cstdlib>
#include <limits>
#include <string_view>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "gemm.h"
#include "pool.h"
#include "winograd.h"

#define RESDENSE_ISA isa_default
#include "sweep.inc"
#include "pool.inc"
#include "winograd.inc"

namespace resdense::cpu {
namespace {

struct Choice {
  const char* name;
  void (*sweep)(const Sweep&);
  void (*pool_forward)(const Pooling&, int64_t, int64_t, void*);
  void (*pool_backward)(const Pooling&, int64_t, int64_t, void*);
  const Winograd* winograd;
  void (*gemm)(const Gemm&) = nullptr;
};

// RESDENSE_CPU_CAPABILITY=avx2 or =default asks for less than the processor has: to compare, and to test.
Choice choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const char* variable = std::getenv("RESDENSE_CPU_CAPABILITY");
  const std::string_view limit = variable ? variable : "";
  if (limit != "default" && limit != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return {"AVX512", isa_avx512::sweep, isa_avx512::pool_forward, isa_avx512::pool_backward, &isa_avx512::winograd, isa_avx512::gemm};
  if (limit != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return {"AVX2", isa_avx2::sweep, isa_avx2::pool_forward, isa_avx2::pool_backward, &isa_avx2::winograd};
#endif
  return {"DEFAULT", isa_default::sweep, isa_default::pool_forward, isa_default::pool_backward, &isa_default::winograd};
}

const Choice chosen = choose();

}  // namespace

void sweep(const Sweep& s) { chosen.sweep(s); }

void pool_forward(const Pooling& p, int64_t begin, int64_t end, void* scratch) { chosen.pool_forward(p, begin, end, scratch); }

void pool_backward(const Pooling& p, int64_t begin, int64_t end, void* scratch) {
  chosen.pool_backward(p, begin, end, scratch);
}

const Winograd winograd = *chosen.winograd;

void (*const gemm)(const Gemm&) = chosen.gemm;

const char* capability() { return chosen.name; }

}  // namespace resdense::cpu
