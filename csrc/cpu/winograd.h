#pragma once
// Winograd's F(2x2, 3x3) and F(4x4, 3x3) for channels-last maps (Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks", 2015): a 2x2 tile of the output takes 16 products a pair of channels, not 36, a 4x4 tile 36, not 144.
//
//   y = A' [ (G g G') . (B' d B) ] A      B' = 1  0 -1  0     G = 1    0    0     A' = 1  1  1  0
//                                              0  1  1  0         1/2  1/2  1/2        0  1 -1 -1
//                                              0 -1  1  0         1/2 -1/2  1/2
//                                              0  1  0 -1         0    0    1
//
//   B' = 4  0 -5  0  1  0     G =  1/4    0    0      A' = 1  1  1  1  1  0
//        0 -4 -4  1  1  0         -1/6 -1/6 -1/6           0  1 -1  2 -2  0
//        0  4 -4 -1  1  0         -1/6  1/6 -1/6           0  1  1  4  4  0
//        0 -2 -1  2  1  0         1/24 1/12  1/6           0  1 -1  8 -8  1
//        0  2 -1 -2  1  0         1/24 -1/12 1/6
//        0  4  0 -5  0  1            0    0    1
//
// d is the window of the input, one wider than the tile on every side, padded by 1; g the filter. An infinity in a window makes the
// whole tile NaN. The gradient of d is such a convolution of y's gradient with the
// turned filter; that of g is G' [ (A dy A') . (B' d B) ] G. The products of a window's points are matrix products (gemm.h),
// the transforms around them kernels.

#include "sweep.h"

namespace resdense::cpu {

// The points of the window of a tile with this side.
constexpr int points_of(int tile) { return (tile + 2) * (tile + 2); }

// Neighbouring tiles of sample n, in this row of tiles, from this column on.
struct TileRun {
  int64_t n, row, column, count;
};

// Transformed values: by point, tile and channel; channels are padded with zeros to whole vectors. They are float32; or, of maps of
// bfloat16 on a processor that multiplies pairs of it, an element is two neighbouring channels or two neighbouring tiles.
struct Points {
  float* data;
  int64_t channels, size;  // padded channels; elements of one point's matrix
  int tile = 2;            // the side of the output's tiles
  enum class Elements { values, channel_pairs, tile_pairs } elements = Elements::values;

  int count() const { return points_of(tile); }
  static int64_t padded(int64_t channels) { return (channels + 15) / 16 * 16; }
};

// A map on its way to or from its points. The pass is what is done to its values before or behind that.
struct Transform {
  Sweep sweep;
  int64_t height, width;
  TileRun tiles;
  int64_t first;                  // of the tiles among those of the points
  Points points, gradient = {};   // B' d B; of an input also A d A', if asked for
};

// The filters of a convolution as a matrix for each point, packed where there is a gemm. With negative strides they are turned. Of
// pairs, an element is of two neighbouring rows.
struct Filters {
  const void* data;
  torch::headeronly::ScalarType dtype;
  int64_t rows, columns, row_stride, column_stride, tap_strides[2];
};

}  // namespace resdense::cpu
