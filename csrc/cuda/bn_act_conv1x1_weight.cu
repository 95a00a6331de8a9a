#include "bn_act_conv1x1_weight.cuh"

#include "conv_weight.h"

namespace resdense::cuda {
namespace {

// A split takes at least so many chunks, as its part of the result is as large as some.
constexpr int64_t kWeightLeastChunks = 4;

// Of the channels.
int64_t weight_tiles(int64_t outputs, int64_t channels) {
  const int64_t panels = outputs <= 128 ? WeightTile<2>::kPanels : WeightTile<3>::kPanels;
  return ceil_div(channels, 64 * panels);
}

template <typename T, int K64>
Tensor run(const Launch& on, Conv1x1Weight<T> p, const Tensor& x) {
  using Tile = WeightTile<K64>;
  const int64_t chunks = ceil_div(p.rows, kWeightChunk), blocks = on.multiprocessors() * Tile::kBlocks;
  static_assert(WeightTile<1>::kPanels == WeightTile<2>::kPanels);
  const int64_t tiles = weight_tiles(p.outputs, p.channels);
  const int64_t split_chunks = std::max(kWeightLeastChunks, ceil_div(chunks, std::max<int64_t>(1, blocks / tiles)));
  const int64_t splits = ceil_div(chunks, split_chunks);
  p.tiles = static_cast<int>(tiles), p.split_chunks = static_cast<int>(split_chunks);

  static_assert(Tile::kBytes <= 160 * 1024, "what resdense_ext.ops.vendor takes a device to need");
  const Tensor parts = new_parts(x, splits, {p.outputs, p.channels});
  p.parts = mutable_floats(parts);
  on.run_shared(Tile::kBytes, bn_act_conv1x1_weight_bwd_kernel<T, K64>, splits * tiles, kWeightThreads, p);
  return parts;
}

template <typename T>
Tensor run(const Launch& on, const Conv1x1Weight<T>& p, const Tensor& x) {
  switch (ceil_div(p.outputs, 64)) {
    case 1: return run<T, 1>(on, p, x);
    case 2: return run<T, 2>(on, p, x);
    default: return run<T, 3>(on, p, x);
  }
}

WeightParts bn_act_conv1x1_weight_backward(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& shift,
                                           double activation, const Optional& z, const Optional& alpha, const Optional& beta,
                                           const Optional& delta, bool overwrite) {
  const Map from = map_of(x, "x"), of = map_of(grad, "grad");
  check_maps(x, from, kConv1x1Inputs, grad, "grad", of, kConv1x1Outputs);
  check_vector(scale, "scale", from.C, x, "x");
  check_vector(shift, "shift", from.C, x, "x");

  // In its place it is only where no other block reads it.
  const Pending pending(grad, z, alpha, beta, delta, overwrite && weight_tiles(of.C, from.C) == 1);
  if (from.numel() == 0) return {new_parts(x, 0, {of.C, from.C}), pending.finished()};
  check_matrix(from, x, "x");
  check_matrix(of, grad, "grad");
  if (z) check_matrix(map_of(*z, "z"), *z, "z");

  const Launch on(x);
  Optional parts;
  dispatch_half_precision(from, [&](auto zero) {
    using T = decltype(zero);
    Conv1x1Weight<T> p{};
    p.grad = static_cast<const T*>(of.data), p.x = static_cast<const T*>(from.data);
    p.scale = static_cast<const float*>(scale.const_data_ptr());
    p.shift = static_cast<const float*>(shift.const_data_ptr());
    p.slope = slope_of(activation);
    p.grad_ss = of.ss, p.x_ss = from.ss;
    p.rows = static_cast<int>(from.rows());
    p.channels = static_cast<int>(from.C), p.outputs = static_cast<int>(of.C);
    p.pending = pending.on_device<T>();
    parts = run(on, p, x);
  });
  return {parts, pending.finished()};
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) { m.impl("bn_act_conv1x1_weight_backward", TORCH_BOX(&bn_act_conv1x1_weight_backward)); }

}  // namespace resdense::cuda
