#pragma once
// What the kernels of convolutions share: how products are rounded and written, and the statistics of what is written.
// A block leaves the moments of its tiles, and a second kernel merges those of all blocks, always in the same order.
// (Their counts differ, unlike those of channel_stats.)
//
// A lane has products[m][n][4] of multiply_add, of 16 positions m and 8 channels n. Rounded they are rounded[i][n]:
// pairs in rows, of which row i lies in m = i / 2, of channels, of which channel k lies in n = k / 2.

#include <bit>

#include "fold.cuh"
#include "matrix.cuh"

namespace resdense::cuda {

template <typename T>
__device__ inline uint32_t round_products(const float (&products)[4], int row) {
  return narrow_word<T>({products[row % 2 * 2], products[row % 2 * 2 + 1]});
}

// A lane's pairs of one row in two neighbouring n: lanes swap them, so that each has four channels on end, from
// written_channel() of the 16, and the warp writes whole sectors.
__device__ inline Vector<uint32_t, 2> swap_pairs(uint32_t left, uint32_t right) {
  const bool odd = threadIdx.x % 2;
  const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? left : right, 1);
  return {odd ? other : left, odd ? right : other};
}

__device__ inline int written_channel() { return threadIdx.x % 2 * 8 + threadIdx.x % 4 / 2 * 4; }

// Mean and sum of squared deviations of channel k in the first `count` rows; 0 where there are none. With deviations d
// from the first row's value one pass is enough: of sum(d^2) - sum(d)^2 / count at least sum(d^2) / count is left.
template <typename T, int ROWS, int N8>
__device__ inline void channel_moments(const uint32_t (&rounded)[ROWS][N8], int k, int count, float inverse,
                                       float& mean, float& m2) {
  const auto value = [&](int row) { return widen_pair(rounded[row][k / 2], T{}).v[k % 2]; };
  float sum = 0, squares = 0;
#pragma unroll
  for (int i = 1; i < ROWS; ++i) {
    const float d = value(i) - value(0);
    if (i < count) sum += d, squares += d * d;
  }
  mean = count > 0 ? value(0) + sum * inverse : 0;
  m2 = squares - sum * sum * inverse;
}

// Merges the moments of the lanes l, l + least, l + 2 * least ... of a warp; lanes below `least` then hold them.
template <int K>
__device__ inline void merge_lanes(Moments<float, K>& mine, int least) {
  for (int half = 16; half >= least; half /= 2) {
    Moments<float, K> other;
    other.count = __shfl_down_sync(0xffffffffu, mine.count, half);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      other.mean[k] = __shfl_down_sync(0xffffffffu, mine.mean[k], half);
      other.m2[k] = __shfl_down_sync(0xffffffffu, mine.m2[k], half);
    }
    mine.merge(other.count, [&](int k, float& mean, float& m2) { mean = other.mean[k], m2 = other.m2[k]; });
  }
}

// Merges the moments of the lanes l and l ^ apart of a warp: the one with the bit set keeps the upper half of K
// channels. After 16, 8 and 4 a lane has the (l / 4)-th eighth. f(k, mean, m2) sets the k-th channel's, of `count`
// positions.
template <int K, typename F>
__device__ inline Moments<float, K / 2> merge_halves(float count, int apart, F f) {
  const bool upper = threadIdx.x & apart;
  const float other_count = __shfl_xor_sync(0xffffffffu, count, apart), total = count + other_count;
  const float share = total == 0 ? 0 : other_count / total, weight = count * share;
  Moments<float, K / 2> kept;
  kept.count = total;
#pragma unroll
  for (int k = 0; k < K / 2; ++k) {
    float mean[2], m2[2];
    f(k, mean[0], m2[0]);
    f(k + K / 2, mean[1], m2[1]);
    const float delta = __shfl_xor_sync(0xffffffffu, upper ? mean[0] : mean[1], apart) - (upper ? mean[1] : mean[0]);
    const float other_m2 = __shfl_xor_sync(0xffffffffu, upper ? m2[0] : m2[1], apart);
    kept.mean[k] = (upper ? mean[1] : mean[0]) + delta * share;
    kept.m2[k] = (upper ? m2[1] : m2[0]) + other_m2 + delta * delta * weight;
  }
  return kept;
}

template <int K>
__device__ inline Moments<float, K / 2> merge_halves(const Moments<float, K>& mine, int apart) {
  const auto of = [&](int k, float& mean, float& m2) { mean = mine.mean[k], m2 = mine.m2[k]; };
  return merge_halves<K>(mine.count, apart, of);
}

// What the warps of a block have gathered in shared memory, [warps][count, means, m2], merged and left for the second
// stage.
template <int CHANNELS>
__device__ inline void leave_moments(const float* gathered, int warps, int channels, float* parts) {
  const int channel = threadIdx.x;
  if (channel >= channels) return;
  Moments<float, 1> all;
  for (int warp = 0; warp < warps; ++warp) {
    const float* const part = gathered + warp * (1 + 2 * CHANNELS);
    all.merge(part[0], part[1 + channel], part[1 + CHANNELS + channel]);
  }
  const int64_t blocks = gridDim.x;
  parts[blockIdx.x] = all.count;
  parts[blocks * (1 + channel) + blockIdx.x] = all.mean[0];
  parts[blocks * (1 + channels + channel) + blockIdx.x] = all.m2[0];
}

// The norm that reads what is written, to be folded where there is one: as `bn_fold_kernel` does.
struct Reader {
  double count, eps;
  int before;                // so many channels it reads before those that are written,
  const float *mean, *m2;    // whose statistics are there
  const float *weight, *bias;
  float *scale, *shift, *rstd;  // nullptr where there is none

  __device__ void fold(int channel, float of_mean, float of_m2) const {
    const FoldOf<float> fold = fold_of(of_mean, of_m2, count, eps, weight ? weight[channel] : 1.0f, bias ? bias[channel] : 0.0f);
    scale[channel] = fold.scale, shift[channel] = fold.shift, rstd[channel] = fold.rstd;
  }

  __device__ void fold_before(int channel) const {
    if (channel < before) fold(channel, mean[channel], m2[channel]);
  }
};

// What the blocks leave, [count, means, m2][blocks], and what the second stage makes of it.
struct ConvStats {
  float* parts;  // nullptr where there are no statistics
  int blocks, channels;
  float *mean, *m2;
  Reader reader;
  unsigned* ticket;  // where the last block is the second stage; 0 before and after

  // By the lanes of a warp: merges what the blocks have left of a channel. (Not by way of the first-level cache, each block's own.)
  __device__ void finish(int channel, int lane) const {
    const float* const means = parts + int64_t(blocks) * (1 + channel);
    Moments<float, 1> all;
    for (int block = lane; block < blocks; block += 32)
      all.merge(__ldcg(parts + block), __ldcg(means + block), __ldcg(means + int64_t(blocks) * channels + block));
    merge_lanes(all, 1);
    if (lane != 0) return;
    mean[channel] = all.mean[0];
    m2[channel] = all.m2[0];
    if (reader.scale) reader.fold(reader.before + channel, all.mean[0], all.m2[0]);
  }

  // By all threads of every block, which has left its parts: the last block that comes here finishes all channels.
  __device__ void finish_last() const {
    bool& s_last = *reinterpret_cast<bool*>(dynamic_shared());  // nobody reads what was there any more
    const int thread = thread_read_anew(), threads = blockDim.x;
    __threadfence();
    __syncthreads();
    if (thread == 0) s_last = atomicAdd(ticket, 1u) + 1 == gridDim.x;
    __syncthreads();
    if (!s_last) return;
    __threadfence();
    if (thread == 0) *ticket = 0;
    for (int channel = thread / 32; channel < channels; channel += threads / 32) finish(channel, thread % 32);
    for (int channel = thread; channel < reader.before; channel += threads) reader.fold_before(channel);
  }
};

// The second stage where it is a launch: a block of one warp for every channel, and for every 32 of those before.
static __global__ void conv_stats_finish_kernel(ConvStats stats) {
  start_kernel();
  const int block = blockIdx.x;
  if (block < stats.channels)
    stats.finish(block, threadIdx.x);
  else
    stats.reader.fold_before((block - stats.channels) * 32 + threadIdx.x);
}

}  // namespace resdense::cuda
