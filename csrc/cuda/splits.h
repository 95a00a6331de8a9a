#pragma once
// The launches of a result that is a sum over splits of the positions.

#include "launch.h"
#include "splits.cuh"

namespace resdense::cuda {

// start(parts) launches what leaves the splits' parts there, [splits] of the shape of `sums`, whose elements are a multiple of 4.
template <typename T, typename F>
inline void run_in_splits(const Launch& on, int64_t splits, const Tensor& sums, F start) {
  const int64_t size = sums.numel();
  const Tensor memory = torch::stable::new_empty(sums, {splits, size}, ScalarType::Float);
  float* const parts = static_cast<float*>(memory.mutable_data_ptr());
  start(parts);
  on.run(sum_splits_kernel<T>, ceil_div(size, 128), kSplitWarps * 32, parts, splits, size, static_cast<T*>(sums.mutable_data_ptr()));
}

}  // namespace resdense::cuda
