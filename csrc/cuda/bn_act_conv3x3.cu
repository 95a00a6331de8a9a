#include "bn_act_conv3x3.cuh"

#include <optional>
#include <tuple>

#include "conv.h"

namespace resdense::cuda {
namespace {

struct Shape {
  int64_t rows, columns, strips, tiles;
};

// Of the tiles of at most so many positions, and so many with those around them, the shape of which the fewest cover the
// stack; and of these the one that reads least.
Shape shape_of_tiles(int64_t stack, int64_t width, int64_t positions, int64_t halo) {
  Shape best{};
  int64_t least = 0;
  for (int64_t columns = std::min<int64_t>(width, 32); columns >= std::min<int64_t>(width, 4); --columns) {
    const int64_t rows = std::min({positions / columns, halo / (columns + 2) - 2, stack});
    const int64_t strips = ceil_div(width, columns), tiles = strips * ceil_div(stack, rows);
    const int64_t around = (rows + 2) * (columns + 2);
    if (best.tiles == 0 || std::tuple(tiles, around) < std::tuple(best.tiles, least)) {
      best = {rows, columns, strips, tiles};
      least = around;
    }
  }
  return best;
}

template <typename T, int N16, bool LARGE>
void run(const Launch& on, Conv3x3<T> p, const Shape& shape, const Optional& mean, const Optional& m2) {
  using Tile = ConvTile<N16, LARGE>;
  const int64_t chunks = ceil_div(p.channels, kConvChunk), memory = on.shared_memory();
  const auto fits = [&](int64_t slots) { return Tile::kBlocks * (Tile::bytes(chunks, slots) + 1024) <= memory; };
  p.slots = static_cast<int>(chunks <= 2 || fits(chunks) ? chunks : 2);
  const int64_t blocks = std::min<int64_t>(shape.tiles, on.multiprocessors() * Tile::kBlocks);
  run_with_stats(on, blocks, p.outputs, mean, m2, [&](float* parts) {
    p.parts = parts;
    on.run_shared(Tile::bytes(chunks, p.slots), bn_act_conv3x3_fwd_kernel<T, N16, LARGE>, blocks, Tile::kThreads, p);
  });
}

template <typename T, int N16>
void run(const Launch& on, Conv3x3<T> p, const Optional& mean, const Optional& m2) {
  const auto shape = [&](auto tile) { return shape_of_tiles(p.rows, p.width, tile.kPositions, tile.kHalo); };
  const auto start = [&]<bool LARGE>(const Shape& s) {
    RESDENSE_CHECK(s.tiles <= std::numeric_limits<int32_t>::max() / 2, "x: expected less than 2^30 tiles, got ", s.tiles);
    p.tile_rows = static_cast<int>(s.rows), p.tile_columns = static_cast<int>(s.columns);
    p.strips = static_cast<int>(s.strips), p.tiles = static_cast<int>(s.tiles);
    run<T, N16, LARGE>(on, p, s, mean, m2);
  };
  // Small tiles have to read more, but leave half of the device idle less often.
  const Shape large = shape(ConvTile<N16, true>{});
  if (2 * large.tiles > on.multiprocessors())
    start.template operator()<true>(large);
  else
    start.template operator()<false>(shape(ConvTile<N16, false>{}));
}

template <typename T>
void run(const Launch& on, const Conv3x3<T>& p, const Optional& mean, const Optional& m2) {
  switch (ceil_div(p.outputs, 16)) {
    case 1: return run<T, 1>(on, p, mean, m2);
    case 2: return run<T, 2>(on, p, mean, m2);
    case 3: return run<T, 3>(on, p, mean, m2);
    default: return run<T, 4>(on, p, mean, m2);
  }
}

void bn_act_conv3x3(const Tensor& x, const Tensor& scale, const Tensor& shift, double negative_slope, const Tensor& weight,
                    const Tensor& out, const Optional& mean, const Optional& m2) {
  const Map from = map_of(x, "x"), to = mutable_map_of(out, "out");
  RESDENSE_CHECK(x.dim() == 4, "x: expected shape (N, C, H, W), got ", shape_string(x));
  check_half_precision(from, "x");
  check_channels(from, "x", kConv3x3Inputs);
  check_dtype(out, "out", from.dtype);
  check_same_device(out, "out", x, "x");
  const int64_t height = x.size(2), width = x.size(3);
  check_positions(out, "out", x);
  check_channels(to, "out", kConv3x3Outputs);
  RESDENSE_CHECK(weight.dim() == 4 && weight.size(0) == to.C && weight.size(1) == from.C && weight.size(2) == 3 &&
                     weight.size(3) == 3,
                 "weight: expected shape (", to.C, ", ", from.C, ", 3, 3), got ", shape_string(weight));
  check_dtype(weight, "weight", from.dtype);
  check_same_device(weight, "weight", x, "x");
  check_vector(scale, "scale", from.C, x, "x");
  check_vector(shift, "shift", from.C, x, "x");

  check_stats(mean, m2, out);
  if (from.numel() == 0) return fill_stats(mean, m2);
  check_rows(from, x, "x");
  check_rows(to, out, "out");
  const int64_t rows = from.N * (height + 1) - 1;
  RESDENSE_CHECK(rows < std::numeric_limits<int32_t>::max() / 2 && width < std::numeric_limits<int32_t>::max() / 2,
                 "x: expected less than 2^30 rows and columns, got ", rows, " and ", width);

  const Launch on(x);
  // Free for the weights of a channels-last network.
  const Tensor rows_of_channels =
      at_aligned_address(torch::stable::contiguous(weight, torch::headeronly::MemoryFormat::ChannelsLast));
  dispatch_half_precision(from, [&](auto zero) {
    using T = decltype(zero);
    Conv3x3<T> p{};
    p.x = static_cast<const T*>(from.data), p.out = static_cast<T*>(to.data);
    p.scale = static_cast<const float*>(scale.const_data_ptr()), p.shift = static_cast<const float*>(shift.const_data_ptr());
    p.weight = static_cast<const T*>(rows_of_channels.const_data_ptr());
    p.slope = static_cast<float>(negative_slope);
    p.x_sn = from.sn, p.x_ss = from.ss, p.out_sn = to.sn, p.out_ss = to.ss;
    p.channels = static_cast<int>(from.C), p.outputs = static_cast<int>(to.C);
    p.rows = static_cast<int>(rows), p.height = static_cast<int>(height), p.width = static_cast<int>(width);
    run(on, p, mean, m2);
  });
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) { m.impl("bn_act_conv3x3", TORCH_BOX(&bn_act_conv3x3)); }

}  // namespace resdense::cuda
