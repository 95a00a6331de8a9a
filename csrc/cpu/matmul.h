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

  Matrix t() const { return {data, cols, rows, col_stride, row_stride}; }

  Tensor tensor(ScalarType dtype) const {
    const int64_t sizes[] = {rows, cols}, strides[] = {row_stride, col_stride};
    return torch::stable::from_blob(data, {sizes, 2}, {strides, 2}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                    dtype);
  }
};

// A scratch tile (or a dense map's) as the matrix channels x positions, whatever its layout.
inline Matrix channels_by_positions(void* data, bool channels_last, int64_t channels, int64_t positions, int64_t size) {
  return channels_last ? Matrix{data, channels, positions, 1, channels} : Matrix{data, channels, positions, size, 1};
}

namespace detail {

inline bool by_gemm(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype, bool accumulate) {
  if (kernels.gemm == nullptr || dtype != ScalarType::Float) return false;
  const auto fits = [](const Matrix& out, const Matrix& b) { return out.col_stride == 1 && b.col_stride == 1 && out.cols % 16 == 0; };
  const auto run = [&](const Matrix& out, const Matrix& a, const Matrix& b) {
    kernels.gemm({static_cast<float*>(out.data), static_cast<const float*>(a.data), static_cast<const float*>(b.data), out.rows, out.cols,
   a.cols, out.row_stride, a.row_stride, a.col_stride, b.row_stride, accumulate});
    return true;
  };
  if (fits(out, b)) return run(out, a, b);
  return fits(out.t(), a.t()) && run(out.t(), b.t(), a.t());
}

}  // namespace detail

// out = a b
inline void matmul(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype) {
  if (detail::by_gemm(out, a, b, dtype, false)) return;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_mm_out(out.tensor(dtype).get(), a.tensor(dtype).get(), b.tensor(dtype).get()));
}

// out += a b
inline void matmul_accumulate(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype) {
  if (detail::by_gemm(out, a, b, dtype, true)) return;
  const Tensor sum = out.tensor(dtype);
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(sum.get(), sum.get(), a.tensor(dtype).get(), b.tensor(dtype).get(), 1.0, 1.0));
}

}  // namespace resdense::cpu
