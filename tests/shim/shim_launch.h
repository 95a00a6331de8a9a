#pragma once
// Stands in for the launch half of csrc/cuda/launch.h: the operators take CPU tensors and are called resdense_shim.

#define RESDENSE_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(resdense_shim, CPU, m)

namespace resdense::cuda {

class Launch {
 public:
  explicit Launch(const Tensor&) {}

  int multiprocessors() const { return shim::multiprocessors; }
  int64_t shared_memory() const { return shim::shared_bytes; }

  template <typename... Parameters, typename... Args>
  void run(void (*kernel)(Parameters...), int64_t blocks, int64_t threads, const Args&... args) const {
    run_shared(0, kernel, blocks, threads, args...);
  }

  template <typename... Parameters, typename... Args>
  void run_shared(int64_t bytes, void (*kernel)(Parameters...), int64_t blocks, int64_t threads, const Args&... args) const {
    shim::launch(blocks, threads, [&] { kernel(static_cast<Parameters>(args)...); }, bytes);
  }
};

}  // namespace resdense::cuda
