#pragma once
// The walk over maps of one shape that every elementwise kernel takes.

#include "walk.cuh"

namespace resdense::cuda {

// Small blocks, as many as the registers allow: what a multiprocessor holds is a multiple of them.
constexpr int kWalkThreads = 128;
// At least so many a multiprocessor: 128 registers a thread, of which all leave some.
constexpr int kWalkBlocks = 4;

// A map seen as rows, the items of the walk. Channels-last: a row a position, of its channels; channels-first: a row a sample,
// of all its values; dense and free of channels: rows of what one block takes. What is called a channel there is the place in
// the row.
struct Walk {
  Share share;
  int64_t last;       // elements of the last row, all of the others' but where a dense map is cut into rows
  int64_t positions;  // how many neighbours of a row share a channel: 1 where a row holds the channels of one position
};

template <int VEC>
__device__ inline Lane lane_of(const Walk& walk) {
  Lane lane = lane_of<VEC, true>(walk.share);
  if (lane.channel >= walk.last && lane.end == walk.share.items) --lane.end;
  return lane;
}

// A coefficient for every element of this thread's vectors, which lie at one place of all its rows.
template <int VEC, typename W>
__device__ inline void load_coefficients(const Walk& walk, const Lane& lane, const W* from, W (&to)[VEC]) {
  if (walk.positions == 1) return load_neighbours(from + lane.channel, lane.count, to);
  int64_t channel = lane.channel / walk.positions;
  int64_t left = (channel + 1) * walk.positions - lane.channel;
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    to[k] = k < lane.count ? from[channel] : W(0);
    if (--left == 0) {
      left = walk.positions;
      ++channel;
    }
  }
}

// A thread has so many vectors under way at once, of one map or of all together; a multiple of so many rows suits both.
constexpr int kRowsAtOnce = 4;

// out = f(k, values) for the k-th element of every vector of this thread, values[i] being that of the i-th map.
template <typename T, int VEC, int MAPS, typename To, typename F>
__device__ inline void walk_maps(const Walk& walk, const Lane& lane, const Items<const T> (&maps)[MAPS],
                                 const Items<To>& out, F f) {
  const auto step = [&]<int UNROLL>(Cursor at, const Vector<T, VEC>(&values)[MAPS][UNROLL]) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      wide_t<To> results[VEC];
#pragma unroll
      for (int k = 0; k < VEC; ++k) {
        wide_t<T> of[MAPS];
#pragma unroll
        for (int i = 0; i < MAPS; ++i) of[i] = widen(values[i][u].v[k]);
        results[k] = f(k, of);
      }
      store_first(out.at(at, lane.channel), narrow<To>(results), lane.count);
      at.advance();
    }
  };
  walk_items<T, VEC, kRowsAtOnce / MAPS>(walk.share, lane, maps, step);
}

// out = f(k, x), and out = f(k, a, b).
template <int VEC, typename T, typename To, typename F>
__device__ inline void walk_rows(const Walk& walk, const Lane& lane, const Items<const T>& x, const Items<To>& out, F f) {
  walk_maps<T, VEC, 1>(walk, lane, {x}, out, [&](int k, const wide_t<T>(&v)[1]) { return f(k, v[0]); });
}

template <int VEC, typename T, typename F>
__device__ inline void walk_rows(const Walk& walk, const Lane& lane, const Items<const T>& a, const Items<const T>& b,
                                 const Items<T>& out, F f) {
  walk_maps<T, VEC, 2>(walk, lane, {a, b}, out, [&](int k, const wide_t<T>(&v)[2]) { return f(k, v[0], v[1]); });
}

}  // namespace resdense::cuda
