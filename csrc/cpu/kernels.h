#pragma once
// What is compiled once for each instruction set (kernels.inc), and chosen when the library is loaded (kernels.cpp).

#include "gemm.h"
#include "pool.h"
#include "sweep.h"
#include "winograd.h"

// Whether the compiler takes a part of a file for another processor than the rest.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RESDENSE_TARGETS 1
#else
#define RESDENSE_TARGETS 0
#endif

namespace resdense::cpu {

struct Kernels {
  const char* name;
  void (*sweep)(const Sweep& s);
  // Items [begin, end) of a pool, whose scratch has scratch_bytes().
  void (*pool_forward)(const Pooling& p, int64_t begin, int64_t end, void* scratch);
  void (*pool_backward)(const Pooling& p, int64_t begin, int64_t end, void* scratch);
  void (*winograd_input)(const Transform& t);
  void (*winograd_output)(const Transform& t);
  // Rows [begin, end) of the filters.
  void (*winograd_filters)(const Filters& f, const Points& points, int64_t begin, int64_t end);
  void (*winograd_filter_gradient)(const Points& points, int64_t rows, int64_t columns, float* out);
  // nullptr where the processor's registers are too few, or where it has no instruction for it.
  void (*gemm)(const Gemm& g);
  void (*gemm_bf16)(const Gemm& g);
  // The right operand of several products.
  void (*pack)(const Packing& p);
  // The rows of a bfloat16 matrix two by two, their values alternating: as gemm_bf16 wants b, or a transposed a. Behind an odd
  // number of rows comes one of zeros.
  void (*pair_rows)(const void* in, int64_t rows, int64_t cols, int64_t row_stride, void* out);
  // Whether the processor has tiles of its own for matrices of bfloat16, with which the framework's library is faster.
  bool matrix_tiles = false;
};

// All of them work on the calling thread.
extern const Kernels kernels;

namespace isa_default { extern const Kernels kernels; }
namespace isa_avx2 { extern const Kernels kernels; }
namespace isa_avx512 { extern const Kernels kernels; }
namespace isa_avx512_bf16 { extern const Kernels kernels; }

}  // namespace resdense::cpu
