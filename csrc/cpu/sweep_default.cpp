#include <cstdlib>
#include <limits>
#include <string_view>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "sweep.h"

#define RESDENSE_ISA isa_default
#include "sweep.inc"

namespace resdense::cpu {
namespace {

struct Choice {
  void (*run)(const Sweep&);
  const char* name;
};

// RESDENSE_CPU_CAPABILITY=avx2 or =default asks for less than the processor has: to compare, and to test.
Choice choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const char* variable = std::getenv("RESDENSE_CPU_CAPABILITY");
  const std::string_view limit = variable ? variable : "";
  if (limit != "default" && limit != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return {isa_avx512::sweep, "AVX512"};
  if (limit != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return {isa_avx2::sweep, "AVX2"};
#endif
  return {isa_default::sweep, "DEFAULT"};
}

const Choice chosen = choose();

}  // namespace

void sweep(const Sweep& s) { chosen.run(s); }

const char* capability() { return chosen.name; }

}  // namespace resdense::cpu
