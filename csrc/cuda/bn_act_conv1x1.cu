#include "bn_act_conv1x1.cuh"

#include "conv.h"

namespace resdense::cuda {
namespace {

template <typename T, int OUTPUTS, bool LARGE>
void run(const Launch& on, Conv1x1<T> p, const Stats& stats) {
  using Tile = Conv1x1Tile<OUTPUTS, LARGE>;
  static_assert(Tile::kBytes <= 160 * 1024, "what resdense_ext.ops.vendor takes a device to need");
  p.tiles = static_cast<int>(ceil_div(p.positions, Tile::kPositions));
  const int64_t blocks = std::min<int64_t>(p.tiles, on.multiprocessors() * Tile::kBlocks);
  stats.run(on, blocks, [&](const ConvStats& left) {
    p.parts = left.parts;
    on.run_shared(Tile::kBytes, bn_act_conv1x1_fwd_kernel<T, OUTPUTS, LARGE>, blocks, kConv1x1Threads, p);
  });
}

template <typename T, int OUTPUTS>
void run(const Launch& on, const Conv1x1<T>& p, const Stats& stats) {
  // Small tiles read the weights more often, but leave half of the device idle less often.
  if (2 * ceil_div(p.positions, Conv1x1Tile<OUTPUTS, true>::kPositions) > on.multiprocessors())
    run<T, OUTPUTS, true>(on, p, stats);
  else
    run<T, OUTPUTS, false>(on, p, stats);
}

template <typename T>
void run(const Launch& on, const Conv1x1<T>& p, const Stats& stats) {
  switch (ceil_div(p.outputs, 64)) {
    case 1: return run<T, 64>(on, p, stats);
    case 2: return run<T, 128>(on, p, stats);
    default: return run<T, 192>(on, p, stats);
  }
}

Folded bn_act_conv1x1(const Tensor& x, const Tensor& scale, const Tensor& shift, double activation, const Tensor& weight,
                      const Optional& bias, const Tensor& out, const Optional& mean, const Optional& m2, std::optional<double> eps,
                      const Optional& reader_weight, const Optional& reader_bias) {
  const Map from = map_of(x, "x"), to = mutable_map_of(out, "out");
  check_maps(x, from, kConv1x1Inputs, out, "out", to, kConv1x1Outputs);
  RESDENSE_CHECK(weight.dim() == 2 && weight.size(0) == to.C && weight.size(1) == from.C, "weight: expected shape (",
                 to.C, ", ", from.C, "), got ", shape_string(weight));
  check_dtype(weight, "weight", from.dtype);
  check_same_device(weight, "weight", x, "x");
  check_vector(scale, "scale", from.C, x, "x");
  check_vector(shift, "shift", from.C, x, "x");
  RESDENSE_CHECK(!bias, "bias: expected none, which the CUDA kernel does not add, got shape ", shape_string(*bias));

  check_stats(mean, m2, out);
  check_reader(eps, reader_weight, reader_bias, mean, out);
  Stats stats(to, mean, m2);
  if (eps) stats.fold(*eps, reader_weight, reader_bias, 0, std::nullopt, std::nullopt);
  if (from.numel() == 0) {
    stats.fill();
    return stats.folded();
  }
  check_matrix(from, x, "x");
  check_matrix(to, out, "out");

  const Launch on(x);
  const Tensor rows_of_channels = at_aligned_address(torch::stable::contiguous(weight));
  const Tensor scales = at_aligned_address(scale), shifts = at_aligned_address(shift);
  dispatch_half_precision(from, [&](auto zero) {
    using T = decltype(zero);
    Conv1x1<T> p{};
    p.x = static_cast<const T*>(from.data), p.out = static_cast<T*>(to.data);
    p.scale = static_cast<const float*>(scales.const_data_ptr());
    p.shift = static_cast<const float*>(shifts.const_data_ptr());
    p.weight = static_cast<const T*>(rows_of_channels.const_data_ptr());
    p.slope = slope_of(activation);
    p.x_ss = from.ss, p.out_ss = to.ss;
    p.positions = static_cast<int>(from.rows());
    p.channels = static_cast<int>(from.C), p.outputs = static_cast<int>(to.C);
    run(on, p, stats);
  });
  return stats.folded();
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) { m.impl("bn_act_conv1x1", TORCH_BOX(&bn_act_conv1x1)); }

}  // namespace resdense::cuda
