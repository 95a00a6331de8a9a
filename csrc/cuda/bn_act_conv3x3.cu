#include "bn_act_conv3x3.cuh"

#include "conv3x3.h"

namespace resdense::cuda {
namespace {

template <typename T, int N16, bool LARGE>
void run(const Launch& on, Conv3x3<T> p, const Stack& stack, const Stats& stats) {
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
  stats.run(on, blocks, [&](const ConvStats& left) {
    p.stats = left;
    on.run_shared(Tile::bytes(chunks, teams, p.all_weights), bn_act_conv3x3_fwd_kernel<T, N16, LARGE>, blocks,
                  teams * Tile::kThreads, p);
  });
}

template <typename T, int N16>
void run(const Launch& on, const Conv3x3<T>& p, const Tensor& x, const Stats& stats) {
  using Large = ConvTile<N16, true>;
  using Small = ConvTile<N16, false>;
  const Stack large = stack_of(x, Large::kPositions, Large::kHalo);
  if (large.tiles > on.multiprocessors())
    run<T, N16, true>(on, p, large, stats);
  else
    run<T, N16, false>(on, p, stack_of(x, Small::kPositions, Small::kHalo), stats);
}

template <typename T>
void run(const Launch& on, const Conv3x3<T>& p, const Tensor& x, const Stats& stats) {
  switch (ceil_div(p.outputs, 16)) {
    case 1: return run<T, 1>(on, p, x, stats);
    case 2: return run<T, 2>(on, p, x, stats);
    case 3: return run<T, 3>(on, p, x, stats);
    default: return run<T, 4>(on, p, x, stats);
  }
}

Folded bn_act_conv3x3(const Tensor& x, const Tensor& scale, const Tensor& shift, double activation, const Tensor& weight,
                      const Tensor& out, const Optional& mean, const Optional& m2, std::optional<double> eps,
                      const Optional& reader_weight, const Optional& reader_bias, const Optional& before_mean,
                      const Optional& before_m2, const Optional& ticket) {
  const Map from = map_of(x, "x"), to = mutable_map_of(out, "out");
  check_conv3x3_maps(x, from, out, "out", to, kConv3x3Outputs);
  check_conv3x3_weight(weight, to.C, x, from);
  check_vector(scale, "scale", from.C, x, "x");
  check_vector(shift, "shift", from.C, x, "x");

  check_stats(mean, m2, out);
  const int64_t before = check_before(before_mean, before_m2, out);
  check_reader(eps, reader_weight, reader_bias, mean, out, before);
  if (ticket) check_ticket(*ticket, out);
  Stats stats(to, mean, m2);
  if (eps) stats.fold(*eps, reader_weight, reader_bias, before, before_mean, before_m2);
  if (ticket) stats.draw_from(*ticket);
  if (from.numel() == 0) {
    stats.fill();
    return stats.folded();
  }
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
    run(on, p, x, stats);
  });
  return stats.folded();
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) { m.impl("bn_act_conv3x3", TORCH_BOX(&bn_act_conv3x3)); }

}  // namespace resdense::cuda
