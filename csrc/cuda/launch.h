#pragma once
// What every launcher shares. Host code, for .cu files only; the one place that launches. (Under RESDENSE_SHIM tests
// put an execution-model shim in its place, and the .cu files compile as plain C++.)

#include <algorithm>
#include <cstdint>
#include <limits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "activation.cuh"
#include "common/map.h"
#include "common/memory.h"
#include "device.cuh"

#ifdef RESDENSE_SHIM
#include "shim_launch.h"
#else

#include <map>
#include <utility>
#include <vector>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#define RESDENSE_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(resdense, CUDA, m)

namespace resdense::cuda {

inline void check(cudaError_t error) {
  RESDENSE_CHECK(error == cudaSuccess, "resdense: CUDA error: ", cudaGetErrorString(error));
}

// What launches want to know of a device; the driver is asked once.
struct Device {
  int multiprocessors;
  int shared_memory, block_shared_memory;  // in bytes: of a multiprocessor, and what a block can have if it asks for it
  bool kernels_wait;                       // it runs code in which kernels wait for those before them, see `start_kernel`

  static const Device& of(int32_t index) {
    static const std::vector<Device> all = [] {
      int count = 0;
      check(cudaGetDeviceCount(&count));
      std::vector<Device> devices;
      for (int i = 0; i < count; ++i) devices.push_back(asked(i));
      return devices;
    }();
    return all[index];
  }

 private:
  static Device asked(int index) {
    const auto attribute = [=](cudaDeviceAttr which) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, which, index));
      return value;
    };
    const int device = 100 * attribute(cudaDevAttrComputeCapabilityMajor) + 10 * attribute(cudaDevAttrComputeCapabilityMinor);
    constexpr int compiled_for[] = {__CUDA_ARCH_LIST__};
    const bool waits =
        std::any_of(std::begin(compiled_for), std::end(compiled_for), [=](int arch) { return 900 <= arch && arch <= device; });
    return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
            attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), waits};
  }
};

// Makes the tensor's device current (a kernel would start on device 0 otherwise) and holds torch's stream on it.
class Launch {
 public:
  explicit Launch(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int multiprocessors() const { return Device::of(device_).multiprocessors; }

  // Of one multiprocessor, in bytes. A block can have all of it but the 1 KiB that every block costs.
  int64_t shared_memory() const { return Device::of(device_).shared_memory; }

  template <typename... Parameters, typename... Args>
  void run(void (*kernel)(Parameters...), int64_t blocks, int64_t threads, const Args&... args) const {
    run_shared(0, kernel, blocks, threads, args...);
  }

  // With so many bytes of dynamic shared memory.
  template <typename... Parameters, typename... Args>
  void run_shared(int64_t bytes, void (*kernel)(Parameters...), int64_t blocks, int64_t threads, const Args&... args) const {
    RESDENSE_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "resdense: expected at most 2^31 - 1 blocks, got ", blocks);
    // What a kernel gets without asking for more.
    if (bytes > 48 * 1024) {
      static thread_local std::map<std::pair<const void*, int32_t>, int64_t> most_of;  // every thread asks once
      const auto this_one = std::pair(reinterpret_cast<const void*>(kernel), device_);
      auto most = most_of.find(this_one);
      if (most == most_of.end()) most = most_of.emplace(this_one, ask_for_most(this_one.first)).first;
      RESDENSE_CHECK(bytes <= most->second, "resdense: expected a GPU with ", bytes, " bytes of shared memory a block, got ",
                     most->second);
    }
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(bytes), config.stream = stream_;
    config.attrs = &early, config.numAttrs = Device::of(device_).kernels_wait ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(args)...));
  }

 private:
  // Lets launches of the kernel ask for all that a block can have beside what the kernel itself declares, and says how much that
  // is. (Always the same, as another thread may be about to launch the kernel with more.)
  int64_t ask_for_most(const void* kernel) const {
    cudaFuncAttributes declared{};
    check(cudaFuncGetAttributes(&declared, kernel));
    const int most = Device::of(device_).block_shared_memory - static_cast<int>(declared.sharedSizeBytes);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
    return most;
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace resdense::cuda

#endif

namespace resdense::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// How many elements 16 bytes hold.
inline int64_t vector_length(ScalarType dtype) {
  return dtype == ScalarType::Double ? 2 : dtype == ScalarType::Float ? 4 : 8;
}

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

// Calls f with the activation of values W.
template <typename W, typename F>
inline void with_activation(double activation, F f) {
  if (is_slope(activation))
    f(Slope<W>{static_cast<W>(activation)});
  else
    f(Curve<W>(activation));
}

// Calls f with a value of the map's element type and the activation.
template <typename F>
inline void dispatch(ScalarType dtype, double activation, F f) {
  dispatch(dtype, [&](auto zero) { with_activation<wide_t<decltype(zero)>>(activation, [&](auto act) { f(zero, act); }); });
}

}  // namespace resdense::cuda
