#pragma once
// What every launcher shares. Host code, for .cu files only.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/map.h"
#include "device.cuh"

namespace resdense::cuda {

// Makes the tensor's device current (a kernel would start on device 0 otherwise) and holds torch's stream on it.
class Launch {
 public:
  explicit Launch(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  int multiprocessors() const {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_));
    return count;
  }

  // To be called right after the launch.
  void check_launch() const { check(cudaGetLastError()); }

 private:
  static void check(cudaError_t error) {
    RESDENSE_CHECK(error == cudaSuccess, "resdense: CUDA error: ", cudaGetErrorString(error));
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline unsigned grid_size(int64_t blocks) {
  RESDENSE_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "resdense: expected at most 2^31 - 1 blocks, got ", blocks);
  return static_cast<unsigned>(blocks);
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Calls f with a value of the map's element type.
template <typename F>
inline void dispatch(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(__half{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    default: fail("resdense: expected a floating dtype, got ", dtype_name(dtype));
  }
}

}  // namespace resdense::cuda
