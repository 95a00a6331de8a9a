#pragma once
// Matrix products of tiles that are in the cache, on the calling thread. Libraries pack both operands at every call, which a
// tile does not repay: on 480 x 144 x 128 a processor with AVX-512 reached two thirds of what it can.

#include <cstdint>

namespace resdense::cpu {

// Memory that will soon be touched. A product asks for it as it goes, so that it comes while the processor is busy.
struct Ahead {
  struct Range { const char *begin, *end; };
  Range *next, *last;  // those not asked for yet
};

// out (rows x cols) = a b + add. Neighbouring columns of b, out and add are adjacent; cols is a multiple of 16.
// The elements of a and b are 32 bits: float32, or two neighbours in depth of bfloat16. A packed b has its columns in panels, as
// `pack` leaves them, and b_row says nothing.
struct Gemm {
  float* out;
  const void *a, *b;
  int64_t rows, cols, depth;
  int64_t out_row, a_row, a_col, b_row;  // strides
  bool packed;
  const float* add = nullptr;            // a matrix, which may be out, or with a stride of 0 one row for all
  int64_t add_row = 0;
  void* rounded = nullptr;               // bfloat16 only, instead of out
  Ahead* ahead = nullptr;
};

// A matrix of depth x cols elements of 32 bits, wherever they lie, to be packed into as many.
struct Packing {
  const uint32_t* in;
  int64_t depth, cols, row_stride, col_stride;
  uint32_t* out;
};

// Of a multiple of so many columns the panels come before those of the columns behind them.
constexpr int64_t PANELS = 64;

}  // namespace resdense::cpu
