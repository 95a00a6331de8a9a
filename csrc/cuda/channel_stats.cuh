#pragma once
// The mean and the sum of squared deviations of every channel. A thread takes the mean of the few values it has in registers,
// then their deviations from it, and merges that; a mean of 1000 deviations costs nothing so, where a sum of squares would
// lose all digits, and it takes 3 operations a value plus the merge where the bytes allow about 14.

#include "reduce.cuh"

namespace resdense::cuda {

// Merges each element of the vectors into the moments of its own channel.
template <typename T, int VEC, int UNROLL>
__device__ inline void merge_vectors(Moments<wide_t<T>, VEC>& moments, const Vector<T, VEC> (&values)[UNROLL]) {
  using W = wide_t<T>;
  moments.merge(W(UNROLL), [&](int k, W& mean, W& m2) {
    W sum = 0;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) sum += widen(values[u].v[k]);
    mean = sum * (W(1) / UNROLL);
    m2 = 0;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const W d = widen(values[u].v[k]) - mean;
      m2 += d * d;
    }
  });
}

// Reads the map once; what the chunks leave is 2 values a channel and chunk.
template <typename T, int VEC, bool ROWS>
__global__ void __launch_bounds__(kReduceThreads, 2)
    channel_stats_kernel(Share share, Items<const T> x, wide_t<T>* mean, wide_t<T>* m2) {
  start_kernel();
  const Lane lane = lane_of<VEC, ROWS>(share);
  Moments<wide_t<T>, VEC> moments;
  walk_items<T, VEC, kAtOnce<1>>(share, lane, {x},
                                 [&](const Cursor&, const auto& values) { merge_vectors(moments, values[0]); });
  leave<ROWS>(share, lane, moments, mean, m2);
}

}  // namespace resdense::cuda
