#include "kernels.h"

#include <cstdlib>
#include <string_view>

namespace resdense::cpu {
namespace {

// RESDENSE_CPU_CAPABILITY=avx512, =avx2 or =default asks for less than the processor has: to compare, and to test.
Kernels choose() {
#if RESDENSE_TARGETS
  __builtin_cpu_init();
  const char* variable = std::getenv("RESDENSE_CPU_CAPABILITY");
  const std::string_view limit = variable ? variable : "";
  const bool avx2 = limit != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && limit != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && limit != "avx512" && __builtin_cpu_supports("avx512bf16")) {
    Kernels chosen = isa_avx512_bf16::kernels;
    chosen.matrix_tiles = __builtin_cpu_supports("amx-bf16");
    return chosen;
  }
  if (avx512) return isa_avx512::kernels;
  if (avx2) return isa_avx2::kernels;
#endif
  return isa_default::kernels;
}

}  // namespace

const Kernels kernels = choose();

}  // namespace resdense::cpu
