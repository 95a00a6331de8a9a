#pragma once
// The mean and the sum of squared deviations of every channel. A thread adds up deviations, and their squares, from the first
// value that it loads, so a mean of 1000 deviations costs nothing, where a sum of squares would lose all digits. Where that value
// is far from all others, its own deviation is what m2 mostly consists of, so that of n values it is wrong by n roundings at most.
// It takes 4 operations a value where the bytes allow about 14.

#include "reduce.cuh"

namespace resdense::cuda {

// Of K channels.
template <typename W, int K>
struct Deviations {
  W count = 0;
  W pivot[K] = {}, sum[K] = {}, squares[K] = {};

  template <typename T, int UNROLL>
  __device__ void add(const Vector<T, K> (&values)[UNROLL]) {
#pragma unroll
    for (int k = 0; k < K; ++k) pivot[k] = count == W(0) ? widen(values[0].v[k]) : pivot[k];
    count += UNROLL;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const W d = widen(values[u].v[k]) - pivot[k];
        sum[k] += d;
        squares[k] += d * d;
      }
    }
  }

  __device__ Moments<W, K> moments() const {
    Moments<W, K> result;
    if (count == W(0)) return result;
    result.count = count;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const W mean = sum[k] / count, m2 = squares[k] - mean * sum[k];
      result.mean[k] = pivot[k] + mean;
      result.m2[k] = m2 < W(0) ? W(0) : m2;  // what rounding may leave of equal values; NaN stays
    }
    return result;
  }
};

// Reads the map once; what the chunks leave is 2 values a channel and chunk.
template <typename T, int VEC, bool ROWS>
__global__ void __launch_bounds__(kReduceThreads, 2)
    channel_stats_kernel(Share share, Items<const T> x, wide_t<T>* mean, wide_t<T>* m2) {
  const Lane lane = lane_of<VEC, ROWS>(share);
  Deviations<wide_t<T>, VEC> deviations;
  walk_items<T, VEC, kAtOnce<1>>(share, lane, {x}, [&](const Cursor&, const auto& values) { deviations.add(values[0]); });
  leave<ROWS>(share, lane, deviations.moments(), mean, m2);
}

}  // namespace resdense::cuda
