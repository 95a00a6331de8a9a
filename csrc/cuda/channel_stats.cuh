#pragma once
// The mean and the sum of squared deviations of every channel, in two stages and one order: bitwise repeatable. A thread
// takes the mean of the few values it has in registers, then their deviations from it, and merges that; a mean of 1000
// deviations costs nothing so, where a sum of squares would lose all digits, and it takes 3 operations a value plus the
// merge where the bytes allow about 14.

#include "device.cuh"

namespace resdense::cuda {

constexpr int kStatsThreads = 256;
// Vectors in registers at once.
constexpr int kStatsUnroll = 4;

// Merges the first `valid` of the vectors, each element of a vector into the moments of its own channel.
template <typename T, int VEC>
__device__ inline void merge_vectors(Moments<wide_t<T>, VEC>& moments, const Vector<T, VEC> (&values)[kStatsUnroll],
                                     int valid) {
  using W = wide_t<T>;
  const W inverse = W(1) / W(valid);
  moments.merge(W(valid), [&](int k, W& mean, W& m2) {
    W sum = 0;
#pragma unroll
    for (int u = 0; u < kStatsUnroll; ++u)
      if (u < valid) sum += widen(values[u].v[k]);
    mean = sum * inverse;
    m2 = 0;
#pragma unroll
    for (int u = 0; u < kStatsUnroll; ++u) {
      if (u < valid) {
        const W d = widen(values[u].v[k]) - mean;
        m2 += d * d;
      }
    }
  });
}

// The map's positions as a thread walks them: r-th position of all samples, in steps without a division.
struct Cursor {
  int64_t n, s, dn, ds, size;

  __device__ Cursor(int64_t first, int64_t step, int64_t size)
      : n(first / size), s(first - first / size * size), dn(step / size), ds(step - step / size * size), size(size) {}

  __device__ void advance() {
    n += dn;
    s += ds;
    if (s >= size) {
      s -= size;
      ++n;
    }
  }
};

// Channels-last: threads side by side hold neighbouring channels and walk down the rows. Reads the map once; the partial
// results are 2 * rows / rows_per_chunk values a channel. One block does tx * VEC channels of one chunk of rows.
template <typename T, int VEC>
__global__ void __launch_bounds__(kStatsThreads, 2)
    channel_stats_rows_kernel(const T* x, int64_t channels, int64_t rows, int64_t positions, int64_t sn, int64_t ss,
                              int64_t rows_per_chunk, int64_t channel_tiles, int tx, wide_t<T>* mean, wide_t<T>* m2) {
  using W = wide_t<T>;
  __shared__ W s_mean[VEC][kStatsThreads];
  __shared__ W s_m2[VEC][kStatsThreads];
  __shared__ W s_count[kStatsThreads];

  const int thread = threadIdx.x;
  const int y = thread / tx, ty = kStatsThreads / tx;
  const int64_t chunk = blockIdx.x / channel_tiles;
  const int64_t channel = ((blockIdx.x - chunk * channel_tiles) * tx + (thread - y * tx)) * VEC;
  const int64_t left = channels - channel;
  const int count = left < VEC ? static_cast<int>(left) : VEC;
  const int64_t end = rows < (chunk + 1) * rows_per_chunk ? rows : (chunk + 1) * rows_per_chunk;

  Moments<W, VEC> moments;

  if (count > 0) {
    int64_t row = chunk * rows_per_chunk + y;
    Cursor at(row, ty, positions);
    while (row < end) {
      Vector<T, VEC> values[kStatsUnroll];
      int valid = 0;
#pragma unroll
      for (int u = 0; u < kStatsUnroll; ++u) {
        if (row < end) {
          const T* from = x + at.n * sn + at.s * ss + channel;
          if (count == VEC) {
            values[u] = load<T, VEC>(from);
          } else {
#pragma unroll
            for (int k = 0; k < VEC; ++k) values[u].v[k] = k < count ? from[k] : T{};
          }
          at.advance();
          row += ty;
          ++valid;
        }
      }
      merge_vectors<T, VEC>(moments, values, valid);
    }
  }

  const auto put = [&] {
    s_count[thread] = moments.count;
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
      s_mean[k][thread] = moments.mean[k];
      s_m2[k][thread] = moments.m2[k];
    }
  };
  put();
  for (int half = ty / 2; half > 0; half /= 2) {
    __syncthreads();
    if (y < half) {
      const int other = thread + half * tx;
      moments.merge(s_count[other], [&](int k, W& a, W& b) { a = s_mean[k][other], b = s_m2[k][other]; });
      put();
    }
  }
  if (y == 0) {
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
      if (k < count) {
        mean[chunk * channels + channel + k] = moments.mean[k];
        m2[chunk * channels + channel + k] = moments.m2[k];
      }
    }
  }
}

// Channels-first: a block does a chunk of one channel's positions, in vectors along them. `items` are vectors of a channel
// in all samples, `positions` vectors of one sample.
template <typename T, int VEC>
__global__ void __launch_bounds__(kStatsThreads, 2)
    channel_stats_planes_kernel(const T* x, int64_t channels, int64_t items, int64_t positions, int64_t sn, int64_t sc,
                                int64_t items_per_chunk, wide_t<T>* mean, wide_t<T>* m2) {
  using W = wide_t<T>;
  constexpr int kWarps = kStatsThreads / 32;
  __shared__ W s_count[kWarps];
  __shared__ W s_mean[kWarps];
  __shared__ W s_m2[kWarps];

  const int thread = threadIdx.x, threads = blockDim.x;
  const int64_t chunk = blockIdx.x / channels;
  const int64_t channel = blockIdx.x - chunk * channels;
  const int64_t end = items < (chunk + 1) * items_per_chunk ? items : (chunk + 1) * items_per_chunk;
  const T* from = x + channel * sc;

  Moments<W, VEC> moments;
  int64_t item = chunk * items_per_chunk + thread;
  Cursor at(item, threads, positions);
  while (item < end) {
    Vector<T, VEC> values[kStatsUnroll];
    int valid = 0;
#pragma unroll
    for (int u = 0; u < kStatsUnroll; ++u) {
      if (item < end) {
        values[u] = load<T, VEC>(from + at.n * sn + at.s * VEC);
        at.advance();
        item += threads;
        ++valid;
      }
    }
    merge_vectors<T, VEC>(moments, values, valid);
  }
  Moments<W, 1> all;
#pragma unroll
  for (int k = 0; k < VEC; ++k) all.merge(moments.count, moments.mean[k], moments.m2[k]);
  for (int half = 16; half > 0; half /= 2) {
    const W count = __shfl_down_sync(0xffffffffu, all.count, half);
    const W other_mean = __shfl_down_sync(0xffffffffu, all.mean[0], half);
    const W other_m2 = __shfl_down_sync(0xffffffffu, all.m2[0], half);
    all.merge(count, other_mean, other_m2);
  }
  if (thread % 32 == 0) {
    s_count[thread / 32] = all.count;
    s_mean[thread / 32] = all.mean[0];
    s_m2[thread / 32] = all.m2[0];
  }
  __syncthreads();
  if (thread == 0) {
    for (int warp = 1; warp < threads / 32; ++warp) all.merge(s_count[warp], s_mean[warp], s_m2[warp]);
    mean[chunk * channels + channel] = all.mean[0];
    m2[chunk * channels + channel] = all.m2[0];
  }
}

constexpr int kFinishChannels = 32;

// The second stage: merges the chunks' results, always in the same order. `total` positions, `per_chunk` a chunk.
template <typename W>
__global__ void __launch_bounds__(kStatsThreads, 2)
    channel_stats_finish_kernel(const W* part_mean, const W* part_m2, int64_t channels, int64_t total, int64_t per_chunk,
                                int64_t chunks, W* mean, W* m2) {
  constexpr int kLanes = kStatsThreads / kFinishChannels;
  __shared__ W s_count[kLanes][kFinishChannels];
  __shared__ W s_mean[kLanes][kFinishChannels];
  __shared__ W s_m2[kLanes][kFinishChannels];

  const int x = threadIdx.x % kFinishChannels, y = threadIdx.x / kFinishChannels;
  const int64_t channel = int64_t(blockIdx.x) * kFinishChannels + x;
  Moments<W, 1> all;
  if (channel < channels) {
    for (int64_t chunk = y; chunk < chunks; chunk += kLanes) {
      const int64_t left = total - chunk * per_chunk;
      const int64_t at = chunk * channels + channel;
      all.merge(W(left < per_chunk ? left : per_chunk), part_mean[at], part_m2[at]);
    }
  }
  s_count[y][x] = all.count;
  s_mean[y][x] = all.mean[0];
  s_m2[y][x] = all.m2[0];
  __syncthreads();
  if (y == 0 && channel < channels) {
    for (int lane = 1; lane < kLanes; ++lane) all.merge(s_count[lane][x], s_mean[lane][x], s_m2[lane][x]);
    mean[channel] = all.mean[0];
    m2[channel] = all.m2[0];
  }
}

}  // namespace resdense::cuda
