#pragma once
// Two values of every channel, gathered from all its positions in two stages and one order, so bitwise repeatable: every
// block reduces a chunk of the positions, and a second kernel the chunks. They are gathered in an accumulator of K channels
// (`Moments`, `Sums`), which is made of W values alone and has
//   merge(other)                 what another thread gathered of the same channels
//   merge(count, first, second)  the two values of `count` positions, where K is 1
//   folded()                     all K as one, where they are of one channel
//   put(k, first, second)        the k-th channel's two values

#include <bit>

#include "walk.cuh"

namespace resdense::cuda {

constexpr int kReduceThreads = 256;

// How many items a thread loads at once.
template <int MAPS>
constexpr int kAtOnce = MAPS == 1 ? 8 : MAPS == 2 && !kPairs ? 4 : 2;

// Sums of two quantities of K channels.
template <typename W, int K>
struct Sums {
  using Value = W;
  static constexpr int kChannels = K;
  W a[K] = {}, b[K] = {};

  __device__ void add(int k, W more_a, W more_b) {
    a[k] += more_a;
    b[k] += more_b;
  }

  __device__ void merge(const Sums& other) {
#pragma unroll
    for (int k = 0; k < K; ++k) add(k, other.a[k], other.b[k]);
  }

  __device__ void merge(W, W more_a, W more_b) {
    static_assert(K == 1);
    add(0, more_a, more_b);
  }

  __device__ Sums<W, 1> folded() const {
    Sums<W, 1> all;
#pragma unroll
    for (int k = 0; k < K; ++k) all.add(0, a[k], b[k]);
    return all;
  }

  __device__ void put(int k, W* first, W* second) const {
    *first = a[k];
    *second = b[k];
  }
};

// An accumulator as it travels between threads.
template <typename A>
struct Words {
  static constexpr int kCount = sizeof(A) / sizeof(typename A::Value);
  typename A::Value v[kCount];
};

// Merges what all threads of a block with the same x have gathered; the first tx threads then hold it. The block has a power
// of two of threads, 32 at least, and tx divides 32.
template <typename A>
__device__ inline void merge_block(A& mine, int tx) {
  using W = typename A::Value;
  constexpr int kWords = Words<A>::kCount;
  // A word of all threads side by side, so that no two of a warp meet in one bank.
  __shared__ W words[kWords][kReduceThreads];

  const int thread = threadIdx.x;
  int half = blockDim.x / 2;
  for (; half >= 32; half /= 2) {
    // Every slot is written once, so one barrier a step is enough.
    if (thread >= half && thread < 2 * half) {
      const auto sent = std::bit_cast<Words<A>>(mine);
#pragma unroll
      for (int w = 0; w < kWords; ++w) words[w][thread] = sent.v[w];
    }
    __syncthreads();
    if (thread < half) {
      Words<A> other;
#pragma unroll
      for (int w = 0; w < kWords; ++w) other.v[w] = words[w][thread + half];
      mine.merge(std::bit_cast<A>(other));
    }
  }
  if (thread >= 32) return;
  for (; half >= tx; half /= 2) {
    auto other = std::bit_cast<Words<A>>(mine);
#pragma unroll
    for (int w = 0; w < kWords; ++w) other.v[w] = __shfl_down_sync(0xffffffffu, other.v[w], half);
    mine.merge(std::bit_cast<A>(other));
  }
}

// The end of the first stage: merges what the block's threads have gathered and leaves it, chunk after chunk.
template <bool ROWS, typename A>
__device__ inline void leave(const Share& share, const Lane& lane, const A& gathered, typename A::Value* first,
                             typename A::Value* second) {
  auto mine = [&] {
    if constexpr (ROWS)
      return gathered;
    else
      return gathered.folded();
  }();
  merge_block(mine, share.tx);
  if (int(threadIdx.x) >= share.tx) return;
  const int64_t at = lane.chunk * share.channels + lane.channel;
#pragma unroll
  for (int k = 0; k < mine.kChannels; ++k)
    if (k < lane.count) mine.put(k, first + at + k, second + at + k);
}

// Few neighbouring channels and many threads for each: their chains are short then. A thread has so many chunks' results under
// way at once.
constexpr int kFinishChannels = 4;
constexpr int kFinishAtOnce = 8;

// What takes the merged values of a channel, to leave them as they are.
template <typename W>
struct Leave {
  W *first, *second;

  template <typename A>
  __device__ void operator()(int64_t channel, const A& all) const {
    all.put(0, first + channel, second + channel);
  }
};

// What the first stage has left: two values of every channel and chunk, [chunks][channels], whose accumulator A is of one channel.
template <typename A>
struct Chunks {
  using W = typename A::Value;
  const W *first, *second;
  int64_t channels, positions, chunk_positions, chunks;

  // The second stage: merges the chunks' results, always in the same order, for finish(channel, all).
  template <typename F>
  __device__ void merge(int64_t block, const F& finish) const {
    constexpr int STEP = kReduceThreads / kFinishChannels;
    const int y = threadIdx.x / kFinishChannels, x = threadIdx.x - y * kFinishChannels;
    const int64_t channel = block * kFinishChannels + x;
    A all;
    if (channel < channels) {
      for (int64_t begin = y; begin < chunks; begin += STEP * kFinishAtOnce) {
        W a[kFinishAtOnce], b[kFinishAtOnce];
#pragma unroll
        for (int u = 0; u < kFinishAtOnce; ++u) {
          const int64_t chunk = begin + u * STEP, at = chunk * channels + channel;
          a[u] = chunk < chunks ? first[at] : W(0);
          b[u] = chunk < chunks ? second[at] : W(0);
        }
#pragma unroll
        for (int u = 0; u < kFinishAtOnce; ++u) {
          const int64_t left = positions - (begin + u * STEP) * chunk_positions;
          if (left > 0) all.merge(W(left < chunk_positions ? left : chunk_positions), a[u], b[u]);
        }
      }
    }
    merge_block(all, kFinishChannels);
    if (y == 0 && channel < channels) finish(channel, all);
  }
};

template <typename A, typename F>
__global__ void __launch_bounds__(kReduceThreads) reduce_finish_kernel(Chunks<A> chunks, F finish) {
  start_kernel();
  chunks.merge(blockIdx.x, finish);
}

}  // namespace resdense::cuda
