#pragma once
// New memory, and views of what there is, without the dispatcher: for code below autograd, where nobody asks what is a view of what.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"

namespace resdense {

inline Tensor empty(int64_t dim, const int64_t* sizes, const int64_t* strides, ScalarType dtype, int32_t device_type,
                    int32_t device_index) {
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, static_cast<int32_t>(dtype), device_type, device_index, &made));
  return Tensor(made);
}

// On the device of another tensor.
inline Tensor empty_vector(int64_t size, ScalarType dtype, const Tensor& like) {
  const int64_t stride = 1;
  const auto device = like.device();
  return empty(1, &size, &stride, dtype, static_cast<int32_t>(device.type()), device.index());
}

// `offset` counts elements from where the tensor begins.
inline Tensor view_of(const Tensor& t, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset = 0) {
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), dim, sizes, strides, offset, &view));
  return Tensor(view);
}

// A matrix as it lies in the tensor's memory.
inline Tensor matrix_view(const Tensor& t, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  const int64_t sizes[] = {rows, cols}, strides[] = {row_stride, col_stride};
  return view_of(t, 2, sizes, strides);
}

}  // namespace resdense
