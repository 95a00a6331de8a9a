#include "bn_act_conv3x3.cuh"

#include "conv3x3.h"

namespace resdense::cuda {
namespace {

template <typename T, int N16, bool LARGE>
void run(const Launch& on, Conv3x3<T> p, const Stack& stack, const Optional& mean, const Optional& m2) {
  using Tile = ConvTile<N16, LARGE>;
  static_assert(Tile::bytes(8, 1, false) <= 160 * 1024, "what resdense_ext.ops.vendor takes a device to need");
  const int64_t chunks = ceil_div(p.channels, kConvChunk), memory = on.shared_memory() - 1024;
  // As many teams as there is room and work for; their weights for good where that takes none of them.
  int64_t teams = std::clamp<int64_t>(ceil_div(stack.tiles, on.multiprocessors()), 1, Tile::kTeams);
  const auto fits = [&](bool all_weights) { return Tile::bytes(chunks, teams, all_weights) <= memory; };
  while (teams > 1 && !fits(true) && !fits(false)) --teams;
  p.stack = stack;
  p.all_weights = fits(true);
  const int64_t blocks = std::min<int64_t>(ceil_div(stack.tiles, teams), on.multiprocessors());
  run_with_stats(on, blocks, p.outputs, mean, m2, Reader{}, [&](float* parts) {
    p.parts = parts;
    on.run_shared(Tile::bytes(chunks, teams, p.all_weights), bn_act_conv3x3_fwd_kernel<T, N16, LARGE>, blocks,
                  teams * Tile::kThreads, p);
  });
}

template <typename T, int N16>
void run(const Launch& on, const Conv3x3<T>& p, const Tensor& x, const Optional& mean, const Optional& m2) {
  using Large = ConvTile<N16, true>;
  using Small = ConvTile<N16, false>;
  const Stack large = stack_of(x, Large::kPositions, Large::kHalo);
  if (large.tiles > on.multiprocessors())
    run<T, N16, true>(on, p, large, mean, m2);
  else
    run<T, N16, false>(on, p, stack_of(x, Small::kPositions, Small::kHalo), mean, m2);
}

template <typename T>
void run(const Launch& on, const Conv3x3<T>& p, const Tensor& x, const Optional& mean, const Optional& m2) {
  switch (ceil_div(p.outputs, 16)) {
    case 1: return run<T, 1>(on, p, x, mean, m2);
    case 2: return run<T, 2>(on, p, x, mean, m2);
    case 3: return run<T, 3>(on, p, x, mean, m2);
    default: return run<T, 4>(on, p, x, mean, m2);
  }
}

void bn_act_conv3x3(const Tensor& x, const Tensor& scale, const Tensor& shift, double activation, const Tensor& weight,
                    const Tensor& out, const Optional& mean, const Optional& m2) {
  const Map from = map_of(x, "x"), to = mutable_map_of(out, "out");
  check_conv3x3_maps(x, from, out, "out", to, kConv3x3Outputs);
  check_conv3x3_weight(weight, to.C, x, from);
  check_vector(scale, "scale", from.C, x, "x");
  check_vector(shift, "shift", from.C, x, "x");

  check_stats(mean, m2, out);
  if (from.numel() == 0) return fill_stats(mean, m2);
  check_rows(from, x, "x");
  check_rows(to, out, "out");

  const Launch on(x);
  const Tensor rows_of_channels = rows_of_taps(weight);
  dispatch_half_precision(from, [&](auto zero) {
    using T = decltype(zero);
    Conv3x3<T> p{};
    p.x = static_cast<const T*>(from.data), p.out = static_cast<T*>(to.data);
    p.scale = static_cast<const float*>(scale.const_data_ptr()), p.shift = static_cast<const float*>(shift.const_data_ptr());
    p.weight = static_cast<const T*>(rows_of_channels.const_data_ptr());
    p.slope = slope_of(activation);
    p.x_sn = from.sn, p.x_ss = from.ss, p.out_sn = to.sn, p.out_ss = to.ss;
    p.channels = static_cast<int>(from.C), p.outputs = static_cast<int>(to.C);
    run(on, p, x, mean, m2);
  });
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) { m.impl("bn_act_conv3x3", TORCH_BOX(&bn_act_conv3x3)); }

}  // namespace resdense::cuda
