#pragma once
// Matrix products of tiles, on the calling thread: by gemm.h where it serves, else through the framework's library.

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "kernels.h"
#include "tile.h"

namespace resdense::cpu {

// A matrix in memory that somebody else owns.
struct Matrix {
  void* data;
  int64_t rows, cols, row_stride, col_stride;
  bool packed = false;  // transposed, or as it is
  bool pairs = false;   // an element is two of bfloat16, which are neighbours in depth

  Matrix t() const { return {data, cols, rows, col_stride, row_stride, packed, pairs}; }

  Tensor tensor(ScalarType dtype) const {
    const int64_t sizes[] = {rows, cols}, strides[] = {row_stride, col_stride};
    return torch::stable::from_blob(data, {sizes, 2}, {strides, 2}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                    dtype);
  }
};

// A tensor of this shape, to read.
inline Matrix matrix_of(const Tensor& t, const char* name, int64_t rows, int64_t cols, ScalarType dtype) {
  RESDENSE_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name, ": expected shape (", rows, ", ", cols, "), got ",
                 shape_string(t));
  check_dtype(t, name, dtype);
  return {const_cast<void*>(t.const_data_ptr()), rows, cols, t.stride(0), t.stride(1)};
}

// Whether a tile of the map is a matrix where it lies: the rows of all samples are equally far apart.
inline bool is_matrix(const Map& m) { return m.channels_last && (m.N <= 1 || m.uniform_rows()); }

// Such a tile, channels x positions.
inline Matrix tile_of(const Map& m, const Tiling& tiling, int64_t tile) {
  char* first = static_cast<char*>(m.data) + tiling.first_row(tile) * m.ss * element_size(m.dtype);
  return {first, m.C, tiling.rows_of(tile), 1, m.ss};
}

// A scratch tile (or a dense map's) as the matrix channels x positions, whatever its layout.
inline Matrix channels_by_positions(void* data, bool channels_last, int64_t channels, int64_t positions, int64_t size) {
  return channels_last ? Matrix{data, channels, positions, 1, channels} : Matrix{data, channels, positions, size, 1};
}

// The columns of a matrix of 32-bit elements in panels, for all products of it as the right operand: their number is a multiple of 16.
inline Matrix pack(const Matrix& m, uint32_t* out) {
  torch::stable::parallel_for(0, (m.cols + PANELS - 1) / PANELS, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * PANELS, count = std::min(end * PANELS, m.cols) - first;
    kernels.pack({static_cast<const uint32_t*>(m.data) + first * m.col_stride, m.rows, count, m.row_stride, m.col_stride,
                  out + first * m.rows});
  });
  return {out, m.rows, m.cols, m.cols, 1, true, m.pairs};
}

// Whether products of the map's tiles, or of their gradients, add up pairs of bfloat16 in float32.
inline bool by_pairs(const Map& x, int64_t cols, int64_t depth) {
  return kernels.gemm_bf16 != nullptr && x.dtype == ScalarType::BFloat16 && x.channels_last && cols % 16 == 0 && depth % 2 == 0;
}

// The columns of a matrix of bfloat16, each adjacent, as pairs for a product along its rows.
inline Matrix pair_columns(const Matrix& m, void* out) {
  kernels.pair_rows(m.data, m.cols, m.rows, m.col_stride, out);
  return {out, m.rows, (m.cols + 1) / 2, 1, m.rows, false, true};
}

// Whether products with a right operand of so many columns are ours.
inline bool by_gemm(ScalarType dtype, int64_t cols) {
  return kernels.gemm != nullptr && dtype == ScalarType::Float && cols % 16 == 0;
}

namespace detail {

inline bool by_gemm(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype, bool accumulate, Ahead* ahead) {
  const auto fits = [&](const Matrix& out, const Matrix& b) {
    return out.col_stride == 1 && b.col_stride == 1 && resdense::cpu::by_gemm(dtype, out.cols);
  };
  const auto run = [&](const Matrix& out, const Matrix& a, const Matrix& b) {
    float* values = static_cast<float*>(out.data);
    const auto gemm = b.pairs ? kernels.gemm_bf16 : kernels.gemm;
    gemm({values, a.data, b.data, out.rows, out.cols, a.cols, out.row_stride, a.row_stride, a.col_stride, b.row_stride, b.packed,
          accumulate ? values : nullptr, out.row_stride, nullptr, ahead});
    return true;
  };
  if (fits(out, b)) return run(out, a, b);
  return fits(out.t(), a.t()) && run(out.t(), b.t(), a.t());
}

}  // namespace detail

// out = a b
inline void matmul(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype, Ahead* ahead = nullptr) {
  if (detail::by_gemm(out, a, b, dtype, false, ahead)) return;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_mm_out(out.tensor(dtype).get(), a.tensor(dtype).get(), b.tensor(dtype).get()));
}

// out += a b
inline void matmul_accumulate(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype, Ahead* ahead = nullptr) {
  if (detail::by_gemm(out, a, b, dtype, true, ahead)) return;
  const Tensor sum = out.tensor(dtype);
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(sum.get(), sum.get(), a.tensor(dtype).get(), b.tensor(dtype).get(), 1.0, 1.0));
}

}  // namespace resdense::cpu
