#pragma once
// The maps of a 3x3 convolution with a padding of 1, cut into tiles.
//
// The samples' rows are seen as one stack with a row of padding between two samples, which serves both as the lower border
// of the one and the upper border of the other. A tile is some columns of some rows of the stack, so that small maps fill a
// tile, too: 7 x 7 ones by 87 %. Its halo is the tile and the positions around it.
//
// The key of a position of the halo is its number without the two columns that a row has at its sides. So keys are
// consecutive in a tap's rows, wherever a row of the tile ends: what is permuted by them lies in different banks.

#include "device.cuh"

namespace resdense::cuda {

constexpr int kConvTaps = 9;

struct Stack {
  int rows, height, width;  // rows of the stack: (height + 1) a sample, but for the last
  int tile_rows, tile_columns;
  int strips, tiles;        // tiles side by side, and all of them
  Divisor by_sample{1}, by_strips{1}, by_columns{1}, by_pitch{1};  // by the rows of a sample, and as they are called

  // Of the halo: the positions of a row, and all.
  __device__ int pitch() const { return tile_columns + 2; }
  __device__ int halo() const { return (tile_rows + 2) * pitch(); }

  // Where a position of the stack lies in a map; -1 where there is padding.
  __device__ int64_t offset(int row, int column, int64_t sn, int64_t ss) const {
    if (row < 0 || row >= rows || column < 0 || column >= width) return -1;
    const int n = by_sample.quotient(row), y = row - n * (height + 1);
    return y == height ? -1 : n * sn + (int64_t(y) * width + column) * ss;
  }
};

}  // namespace resdense::cuda
