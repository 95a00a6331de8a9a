#pragma once

#include "elementwise.cuh"

namespace resdense::cuda {

// The same widening and narrowing as torch's: float64 becomes a 16-bit type by way of float32.
template <typename To, typename From>
__device__ inline To convert(From value) {
  To result;
  narrow(static_cast<wide_t<To>>(widen(value)), result);
  return result;
}

// Vectors of as many elements as 16 bytes hold of the wider type.
template <typename From, typename To>
constexpr int kCopyVector = kVector<From> < kVector<To> ? kVector<From> : kVector<To>;

// out = x, where both have one layout. Each map's bytes once.
template <typename From, typename To, int VEC>
__global__ void __launch_bounds__(kWalkThreads, kWalkBlocks)
    copy_map_kernel(Walk walk, Items<const From> x, Items<To> out) {
  start_kernel();
  walk_rows<VEC>(walk, lane_of<VEC>(walk), x, out, [](int, wide_t<From> value) { return static_cast<wide_t<To>>(value); });
}

constexpr int kTile = 32;
constexpr int kTileRows = 8;

// A sample as a matrix: its rows are adjacent in x, its columns in out.
struct Transpose {
  int64_t rows, columns;
  int64_t row_tiles, column_tiles;
  int64_t x_sn, x_row, out_sn, out_column;  // strides
};

// out = x, where the one is channels-last and the other channels-first: by way of a tile in shared memory, so that reads and
// writes both are of neighbours.
template <typename From, typename To>
__global__ void __launch_bounds__(kTile * kTileRows) copy_map_transpose_kernel(Transpose t, const From* x, To* out) {
  start_kernel();
  // A column more, so that the elements of a column lie in different banks.
  __shared__ To tile[kTile][kTile + 1];
  const int64_t tiles = t.row_tiles * t.column_tiles;
  const int64_t n = blockIdx.x / tiles, in_sample = blockIdx.x - n * tiles;
  const int64_t row_tile = in_sample / t.column_tiles;
  const int64_t row = row_tile * kTile, column = (in_sample - row_tile * t.column_tiles) * kTile;
  const int lane = threadIdx.x % kTile, first = threadIdx.x / kTile;

#pragma unroll
  for (int i = first; i < kTile; i += kTileRows)
    if (row + i < t.rows && column + lane < t.columns)
      tile[i][lane] = convert<To>(x[n * t.x_sn + (row + i) * t.x_row + column + lane]);
  __syncthreads();
#pragma unroll
  for (int i = first; i < kTile; i += kTileRows)
    if (column + i < t.columns && row + lane < t.rows)
      out[n * t.out_sn + (column + i) * t.out_column + row + lane] = tile[lane][i];
}

}  // namespace resdense::cuda
