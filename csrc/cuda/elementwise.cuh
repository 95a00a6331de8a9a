#pragma once
// The walk over maps of one shape that every elementwise kernel takes.

#include "device.cuh"

namespace resdense::cuda {

// A map seen as rows of `inner` elements. Channels-last: a row a position, of its channels; channels-first: a row a
// sample, of all its values; dense and free of channels: one single row.
struct Walk {
  int64_t rows, inner;
  int64_t rows_per_sample;  // equal to rows where one stride leads through all of them
  int64_t inner_tiles;      // how many blocks share a row
  int tx, ty;               // threads of a block along a row and across rows
};

// How many rows a thread does: that many loads of every operand are under way at once.
constexpr int kRowsPerThread = 4;

template <typename T>
struct Operand {
  T* data;
  int64_t sn, sr, si;  // strides of sample, row within the sample, and element; si is 1 where VEC > 1

  __device__ T* row(const Walk& walk, int64_t row) const {
    if (walk.rows_per_sample == walk.rows) return data + row * sr;
    const int64_t n = row / walk.rows_per_sample;
    return data + n * sn + (row - n * walk.rows_per_sample) * sr;
  }
};

// Where a thread works: the elements [i, i + count) of rows first, first + ty, ...; count <= 0 means nowhere.
struct Place {
  int64_t i, first;
  int count;
};

template <int VEC>
__device__ inline Place place_of(const Walk& walk) {
  const int64_t row_tile = blockIdx.x / walk.inner_tiles;
  const int64_t inner_tile = blockIdx.x - row_tile * walk.inner_tiles;
  const int y = threadIdx.x / walk.tx, x = threadIdx.x - y * walk.tx;
  Place place;
  place.i = (inner_tile * walk.tx + x) * VEC;
  place.first = row_tile * (walk.ty * kRowsPerThread) + y;
  const int64_t left = y < walk.ty ? walk.inner - place.i : 0;
  place.count = left < VEC ? static_cast<int>(left) : VEC;
  return place;
}

// f(k, channel) for the k-th element of every vector of this thread: they lie at the same place of every one of its rows, so
// their channels' coefficients are loaded once. `positions` is how many neighbours of a row share a channel: 1 where a row
// holds the channels of one position.
template <int VEC, typename F>
__device__ inline void each_channel(const Place& place, int64_t positions, F f) {
  int64_t channel = positions == 1 ? place.i : place.i / positions;
  int64_t left = (channel + 1) * positions - place.i;
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    if (k < place.count) f(k, channel);
    if (--left == 0) {
      left = positions;
      ++channel;
    }
  }
}

// out = f(k, values) for the k-th element of every vector of this thread, values[i] being that of the i-th map. All loads
// come before the first store; the one vector that the end of a row cuts off goes a value at a time.
template <typename T, typename To, int VEC, int MAPS, typename F>
__device__ inline void walk_maps(const Walk& walk, const Place& place, const Operand<const T> (&maps)[MAPS],
                                 const Operand<To>& out, F f) {
  using W = wide_t<T>;
  if (place.count < VEC) {
#pragma unroll 1
    for (int u = 0; u < kRowsPerThread; ++u) {
      const int64_t row = place.first + int64_t(u) * walk.ty;
      if (row >= walk.rows) return;
#pragma unroll
      for (int k = 0; k < VEC; ++k) {
        if (k < place.count) {
          W values[MAPS];
#pragma unroll
          for (int i = 0; i < MAPS; ++i) values[i] = widen(maps[i].row(walk, row)[place.i + k]);
          narrow(f(k, values), out.row(walk, row)[place.i + k]);
        }
      }
    }
    return;
  }
  Vector<T, VEC> loaded[MAPS][kRowsPerThread];
#pragma unroll
  for (int u = 0; u < kRowsPerThread; ++u) {
    const int64_t row = place.first + int64_t(u) * walk.ty;
    if (row < walk.rows) {
#pragma unroll
      for (int i = 0; i < MAPS; ++i) loaded[i][u] = load<T, VEC>(maps[i].row(walk, row) + place.i * maps[i].si);
    }
  }
#pragma unroll
  for (int u = 0; u < kRowsPerThread; ++u) {
    const int64_t row = place.first + int64_t(u) * walk.ty;
    if (row < walk.rows) {
      Vector<To, VEC> result;
#pragma unroll
      for (int k = 0; k < VEC; ++k) {
        W values[MAPS];
#pragma unroll
        for (int i = 0; i < MAPS; ++i) values[i] = widen(loaded[i][u].v[k]);
        narrow(f(k, values), result.v[k]);
      }
      store<To, VEC>(out.row(walk, row) + place.i * out.si, result);
    }
  }
}

// out = f(k, x), and out = f(k, a, b).
template <typename T, int VEC, typename To, typename F>
__device__ inline void walk_rows(const Walk& walk, const Place& place, const Operand<const T>& x, const Operand<To>& out, F f) {
  walk_maps<T, To, VEC>(walk, place, {x}, out, [&](int k, const wide_t<T>(&v)[1]) { return f(k, v[0]); });
}

template <typename T, int VEC, typename F>
__device__ inline void walk_rows(const Walk& walk, const Place& place, const Operand<const T>& a,
                                 const Operand<const T>& b, const Operand<T>& out, F f) {
  walk_maps<T, T, VEC>(walk, place, {a, b}, out, [&](int k, const wide_t<T>(&v)[2]) { return f(k, v[0], v[1]); });
}

}  // namespace resdense::cuda
