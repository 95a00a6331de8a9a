#pragma once
// A result that is a sum over the positions, of which every split of them leaves its part: the parts' sum, always in the same
// order, rounded once.

#include "device.cuh"

namespace resdense::cuda {

constexpr int kSplitWarps = 8;    // of a block, that share the splits out
constexpr int kSplitValues = 128; // that a block adds up

template <typename T>
struct Splits {
  const float* parts;  // [splits][size]
  int splits;
  int64_t size;        // a multiple of 4
  T* sums;

  // Those of the block: a lane adds up four neighbouring values, a warp every kSplitWarps-th split.
  __device__ void add_up(int64_t block) const {
    using Four = Vector<float, 4>;
    __shared__ Four s_sums[kSplitWarps][32];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int64_t first = block * kSplitValues, mine = first + lane * 4;

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
    if (thread < kSplitValues && first + thread < size) {
      float all = 0;
#pragma unroll
      for (int w = 0; w < kSplitWarps; ++w) all += s_sums[w][thread / 4].v[thread % 4];
      narrow(all, sums[first + thread]);
    }
  }
};

}  // namespace resdense::cuda
