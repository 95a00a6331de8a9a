#pragma once
// Two values of every channel, gathered from all its positions in two stages and one order, so bitwise repeatable: every
// block reduces a chunk of the positions, and a second kernel the chunks. They are gathered in an accumulator of K channels
// (`Moments`, `Sums`), which is made of W values alone and has
//   merge(other)                 what another thread gathered of the same channels
//   merge(count, first, second)  the two values of `count` positions, where K is 1
//   folded()                     all K as one, where they are of one channel
//   put(k, first, second)        the k-th channel's two values

#include <bit>

#include "device.cuh"

namespace resdense::cuda {

constexpr int kReduceThreads = 256;

// How maps are shared out. In rows (channels-last, and any mixture of layouts) tx threads side by side hold neighbouring
// channels, in vectors, and walk down the positions. In planes (channels-first) tx is 1: a block walks along the positions
// of one channel, in vectors.
struct Share {
  int64_t channels;
  int64_t items;         // of a channel: its positions, or the vectors along them
  int64_t sample_items;  // those of one sample; equal to items where one stride leads through all
  int64_t chunk_items;
  int64_t tiles;         // how many blocks share a chunk
  int tx;
};

// The items as a thread walks them: the s-th of sample n, in steps without a division.
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

template <typename T>
struct Items {
  T* data;
  int64_t sn, si, sc;  // strides of sample, item and channel

  __device__ T* at(int64_t n, int64_t s, int64_t channel) const { return data + n * sn + s * si + channel * sc; }
  __device__ T* at(const Cursor& cursor, int64_t channel) const { return at(cursor.n, cursor.s, channel); }
};

// Where a thread works: at the items first, first + step, ... before end.
struct Lane {
  int64_t chunk, channel;
  int64_t first, step, end;
  int count;  // elements of its vectors that exist
};

template <int VEC, bool ROWS>
__device__ inline Lane lane_of(const Share& share) {
  const int y = threadIdx.x / share.tx, x = threadIdx.x - y * share.tx;
  Lane lane;
  lane.chunk = blockIdx.x / share.tiles;
  lane.channel = ((blockIdx.x - lane.chunk * share.tiles) * share.tx + x) * (ROWS ? VEC : 1);
  lane.first = lane.chunk * share.chunk_items + y;
  lane.step = blockDim.x / share.tx;
  const int64_t left = share.channels - lane.channel;
  lane.count = ROWS && left < VEC ? static_cast<int>(left) : VEC;
  const int64_t end = (lane.chunk + 1) * share.chunk_items;
  lane.end = left <= 0 ? 0 : end < share.items ? end : share.items;
  return lane;
}

// f(at, values) for UNROLL items of the lane from the cursor on, which moves past them: values[i][u] is the u-th vector of the
// i-th map, filled up with 0 where the last channel cuts it off, and `at` the cursor at the first of them.
template <typename T, int VEC, int UNROLL, int MAPS, typename F>
__device__ inline void walk_group(Cursor& cursor, const Lane& lane, const Items<const T> (&maps)[MAPS], F& f) {
  const Cursor at = cursor;
  Vector<T, VEC> values[MAPS][UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
#pragma unroll
    for (int i = 0; i < MAPS; ++i) values[i][u] = load_first<T, VEC>(maps[i].at(cursor, lane.channel), lane.count);
    cursor.advance();
  }
  f(at, values);
}

// How many items a thread loads at once.
template <int MAPS>
constexpr int kAtOnce = MAPS == 1 ? 4 : 2;

// f(at, values) for all items of the lane. A group's loads are under way at once; what fills no group, and vectors that are cut
// off, go one by one: with conditions in a group every 16-bit element would take a register of its own.
template <typename T, int VEC, int UNROLL, int MAPS, typename F>
__device__ inline void walk_items(const Share& share, const Lane& lane, const Items<const T> (&maps)[MAPS], F f) {
  Cursor cursor(lane.first, lane.step, share.sample_items);
  int64_t item = lane.first;
  if (UNROLL > 1 && lane.count == VEC)
    for (; item + (UNROLL - 1) * lane.step < lane.end; item += UNROLL * lane.step)
      walk_group<T, VEC, UNROLL>(cursor, lane, maps, f);
#pragma unroll 1
  for (; item < lane.end; item += lane.step) walk_group<T, VEC, 1>(cursor, lane, maps, f);
}

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

// 32 bytes of neighbouring channels, the least that memory gives, and many threads a channel: their chains are short then.
constexpr int kFinishChannels = 8;

// The second stage: merges the chunks' results, always in the same order. A is of one channel.
template <typename A>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_finish_kernel(const typename A::Value* part_first, const typename A::Value* part_second, int64_t channels,
                         int64_t positions, int64_t chunk_positions, int64_t chunks, typename A::Value* first,
                         typename A::Value* second) {
  using W = typename A::Value;
  const int y = threadIdx.x / kFinishChannels, x = threadIdx.x - y * kFinishChannels;
  const int64_t channel = int64_t(blockIdx.x) * kFinishChannels + x;
  A all;
  if (channel < channels) {
    for (int64_t chunk = y; chunk < chunks; chunk += kReduceThreads / kFinishChannels) {
      const int64_t left = positions - chunk * chunk_positions;
      const int64_t at = chunk * channels + channel;
      all.merge(W(left < chunk_positions ? left : chunk_positions), part_first[at], part_second[at]);
    }
  }
  merge_block(all, kFinishChannels);
  if (y == 0 && channel < channels) all.put(0, first + channel, second + channel);
}

}  // namespace resdense::cuda
