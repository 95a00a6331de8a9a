#pragma once
// How the threads of a kernel share maps of one shape out, and walk over them.

#include "device.cuh"

namespace resdense::cuda {

// In rows (channels-last, and any mixture of layouts) tx threads side by side hold neighbouring channels, in vectors, and walk
// down the positions. In planes (channels-first) tx is 1: a block walks along the positions of one channel, in vectors.
struct Share {
  int64_t channels;
  int64_t items;         // of a channel: its positions, or the vectors along them
  int64_t sample_items;  // those of one sample; equal to items where one stride leads through all
  int64_t chunk_items;
  unsigned tiles;        // how many blocks share a chunk
  int tx;
};

// The items as a thread walks them: the s-th of sample n, in steps without a division.
struct Cursor {
  int64_t n, s, dn, ds, size;

  __device__ Cursor(int64_t first, int64_t step, int64_t size)
      : n(first < size ? 0 : first / size),
        s(first - n * size),
        dn(step < size ? 0 : step / size),
        ds(step - dn * size),
        size(size) {}

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
  const unsigned chunk = blockIdx.x / share.tiles;
  Lane lane;
  lane.chunk = chunk;
  lane.channel = (int64_t(blockIdx.x - chunk * share.tiles) * share.tx + x) * (ROWS ? VEC : 1);
  lane.first = lane.chunk * share.chunk_items + y;
  lane.step = blockDim.x / share.tx;
  const int64_t left = share.channels - lane.channel;
  lane.count = ROWS && left < VEC ? static_cast<int>(left) : VEC;
  const int64_t end = (lane.chunk + 1) * share.chunk_items;
  lane.end = left <= 0 || y >= lane.step ? 0 : end < share.items ? end : share.items;
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
    for (int i = 0; i < MAPS; ++i) {
      const T* const from = maps[i].at(cursor, lane.channel);
      // Groups are of whole vectors.
      values[i][u] = UNROLL > 1 ? load<T, VEC>(from) : load_first<T, VEC>(from, lane.count);
    }
    cursor.advance();
  }
  f(at, values);
}

// f(at, values) for all items of the lane. A group's loads are under way at once; what fills no group, and vectors that are cut
// off, go one by one: with conditions in a group every 16-bit element would take a register of its own.
template <typename T, int VEC, int UNROLL, int MAPS, typename F>
__device__ inline void walk_items(const Share& share, const Lane& lane, const Items<const T> (&maps)[MAPS], F f) {
  Cursor cursor(lane.first, lane.step, share.sample_items);
  int64_t item = lane.first;
  if (UNROLL > 1 && lane.count == VEC) {
#pragma unroll 1
    for (; item + (UNROLL - 1) * lane.step < lane.end; item += UNROLL * lane.step)
      walk_group<T, VEC, UNROLL>(cursor, lane, maps, f);
  }
#pragma unroll 1
  for (; item < lane.end; item += lane.step) walk_group<T, VEC, 1>(cursor, lane, maps, f);
}

}  // namespace resdense::cuda
