#pragma once
// How the stack of a map's rows is cut into tiles: chosen here, on the host.

#include <tuple>

#include "launch.h"
#include "stack.cuh"

namespace resdense::cuda {

// Of the tiles of at most so many positions, and so many with those around them, the shape of which the fewest cover the
// stack of x, (N, C, H, W) of at least one position; and of these the one that reads least. For those who take positions by
// twos the columns are even, and at least 8.
inline Stack stack_of(const Tensor& x, int64_t positions, int64_t halo, bool twos = false) {
  const int64_t height = x.size(2), width = x.size(3), rows = x.size(0) * (height + 1) - 1;
  constexpr int64_t most = std::numeric_limits<int32_t>::max() / 2;
  RESDENSE_CHECK(rows < most && width < most, "x: expected less than 2^30 rows and columns, got ", rows, " and ", width);

  Stack best{};
  int64_t least = 0;
  const int64_t step = twos ? 2 : 1;
  const int64_t widest = std::min<int64_t>(twos ? std::max<int64_t>(8, ceil_div(width, 2) * 2) : width, 32);
  for (int64_t columns = widest; columns >= std::min<int64_t>(widest, twos ? 8 : 4); columns -= step) {
    const int64_t tile_rows = std::min({positions / columns, halo / (columns + 2) - 2, rows});
    const int64_t strips = ceil_div(width, columns), tiles = strips * ceil_div(rows, tile_rows);
    const int64_t around = (tile_rows + 2) * (columns + 2);
    RESDENSE_CHECK(tiles < most, "x: expected less than 2^30 tiles, got ", tiles);
    if (best.tiles == 0 || std::tuple(tiles, around) < std::tuple(int64_t(best.tiles), least)) {
      const auto number = [](int64_t n) { return static_cast<int>(n); };
      best = {number(rows), number(height), number(width), number(tile_rows), number(columns), number(strips), number(tiles)};
      least = around;
    }
  }
  best.by_sample = Divisor(best.height + 1), best.by_strips = Divisor(best.strips);
  best.by_columns = Divisor(best.tile_columns), best.by_pitch = Divisor(best.tile_columns + 2);
  return best;
}

}  // namespace resdense::cuda
