#include "bn_act_conv3x3_weight.cuh"

#include "conv3x3.h"
#include "conv_weight.h"

namespace resdense::cuda {
namespace {

template <typename T, int M16>
Tensor run(const Launch& on, Conv3x3Weight<T> p, const Tensor& x) {
  using Tile = Conv3x3WeightTile;
  const int64_t chunks = ceil_div(p.channels, Tile::kChannels), blocks = std::max<int64_t>(1, on.multiprocessors() / chunks);
  p.chunks = static_cast<int>(chunks);
  p.chunk_channels = static_cast<int>(ceil_div(p.channels, chunks * 16) * 16);

  // Tiles that all splits have equally many of: as low as that number allows.
  Stack& stack = p.stack = stack_of(x, Tile::kPositions, Tile::kHalo, true);
  const int64_t split_tiles = ceil_div(stack.tiles, blocks);
  if (split_tiles > 1) {
    stack.tile_rows = static_cast<int>(ceil_div(stack.rows, split_tiles * blocks / stack.strips));
    stack.tiles = static_cast<int>(ceil_div(stack.rows, stack.tile_rows) * stack.strips);
  }
  const int64_t splits = ceil_div(stack.tiles, split_tiles);
  p.splits = static_cast<int>(splits);

  static_assert(Tile::kBytes <= 160 * 1024, "what resdense_ext.ops.vendor takes a device to need");
  const Tensor parts = new_parts(x, splits, {p.outputs, 3, 3, p.channels});
  p.parts = mutable_floats(parts);
  on.run_shared(Tile::kBytes, bn_act_conv3x3_weight_bwd_kernel<T, M16>, splits * chunks, Tile::kThreads, p);
  return parts;
}

WeightParts bn_act_conv3x3_weight_backward(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& shift,
                                           double activation, const Optional& z, const Optional& alpha, const Optional& beta,
                                           const Optional& delta, bool overwrite) {
  const Map from = map_of(x, "x"), of = map_of(grad, "grad");
  check_conv3x3_maps(x, from, grad, "grad", of, kConv3x3BackwardOutputs);
  check_vector(scale, "scale", from.C, x, "x");
  check_vector(shift, "shift", from.C, x, "x");

  // In its place it is only where no other block reads it.
  const Pending pending(grad, z, alpha, beta, delta, overwrite && from.C <= Conv3x3WeightTile::kChannels);
  if (from.numel() == 0) return {new_parts(x, 0, {of.C, 3, 3, from.C}), pending.finished()};
  check_rows(from, x, "x");
  check_rows(of, grad, "grad");
  check_few_rows(from, "x");
  check_few_rows(of, "grad");
  if (z) check_rows(map_of(*z, "z"), *z, "z");

  const Launch on(x);
  const Tensor aligned_scale = at_aligned_address(scale), aligned_shift = at_aligned_address(shift);
  Optional parts;
  dispatch_half_precision(from, [&](auto zero) {
    using T = decltype(zero);
    Conv3x3Weight<T> p{};
    p.grad = static_cast<const T*>(of.data), p.x = static_cast<const T*>(from.data);
    p.scale = static_cast<const float*>(aligned_scale.const_data_ptr());
    p.shift = static_cast<const float*>(aligned_shift.const_data_ptr());
    p.slope = slope_of(activation);
    p.grad_sn = of.sn, p.grad_ss = of.ss, p.x_sn = from.sn, p.x_ss = from.ss;
    p.channels = static_cast<int>(from.C), p.outputs = static_cast<int>(of.C);
    p.pending = pending.on_device<T>();
    parts = of.C <= 16 ? run<T, 1>(on, p, x) : run<T, 2>(on, p, x);
  });
  return {parts, pending.finished()};
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) { m.impl("bn_act_conv3x3_weight_backward", TORCH_BOX(&bn_act_conv3x3_weight_backward)); }

}  // namespace resdense::cuda
