#pragma once
// A result that is a sum over the positions, of which every split of them leaves its part: the parts' sum, always in the same
// order, rounded once.

#include "device.cuh"

namespace resdense::cuda {

constexpr int kSplitWarps = 8;  // that share the splits out

// A lane adds up four neighbouring values, a warp every kSplitWarps-th split.
template <typename T>
__global__ void __launch_bounds__(kSplitWarps * 32)
    sum_splits_kernel(const float* parts, int splits, int64_t size, T* sums) {
  start_kernel();
  using Four = Vector<float, 4>;
  __shared__ Four s_sums[kSplitWarps][32];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t first = blockIdx.x * int64_t(128), mine = first + lane * 4;

  Four sum{};
  if (mine < size) {
#pragma unroll 4
    for (int split = warp; split < splits; split += kSplitWarps) {
      const Four part = load<float, 4>(parts + split * size + mine);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum.v[k] += part.v[k];
    }
  }
  s_sums[warp][lane] = sum;
  __syncthreads();
  if (thread < 128 && first + thread < size) {
    float all = 0;
#pragma unroll
    for (int w = 0; w < kSplitWarps; ++w) all += s_sums[w][thread / 4].v[thread % 4];
    narrow(all, sums[first + thread]);
  }
}

}  // namespace resdense::cuda
