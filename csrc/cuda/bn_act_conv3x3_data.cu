#include "bn_act_conv3x3_data.cuh"

#include <tuple>

#include "conv3x3.h"
#include "conv_data.h"

namespace resdense::cuda {
namespace {

template <typename T, int N16>
void run_conv3x3_data(const Launch& on, Conv3x3Data<T> p, const Tensor& x, const CorrectData& finish, const Optional& parts,
                      const Optional& dweight) {
  using Tile = Conv3x3DataTile<N16>;
  using Tables = Conv3x3DataTables<N16>;
  // A halo takes the most with a column, and so the most rows.
  static_assert(Tables::bytes(Tile::halo_pieces(Tile::kHalo / 3 - 2, 1), Tile::kWarps, 2) <= 160 * 1024,
                "what resdense_ext.ops.vendor takes a device to need");
  p.stack = stack_of(x, Tile::kPositions, Tile::kHalo);
  const int64_t multiprocessors = on.multiprocessors(), tiles = p.stack.tiles, groups = ceil_div(p.channels, kDataChannels);

  // Few chunks, as each reads the gradients; more where there are fewer tiles than multiprocessors.
  const int64_t chunks = std::clamp(multiprocessors / tiles, ceil_div(groups, Tile::kWarps), groups);
  const int64_t across = ceil_div(groups, chunks), down = Tile::kWarps / across, warps = across * down;
  const int64_t halo_pieces = Tile::halo_pieces(p.stack.tile_rows, p.stack.tile_columns);
  const int64_t bytes = Tables::bytes(halo_pieces, across, p.accumulate ? 2 : 1);
  const int64_t blocks = std::min<int64_t>(Tile::kBlocks, on.shared_memory() / (bytes + 1024));
  const int64_t slices = std::clamp<int64_t>(multiprocessors * blocks / chunks, 1, tiles);
  const int64_t chain = kDataChain / Tile::kSteps * down;
  const auto number = [](int64_t n) { return static_cast<int>(n); };
  p.slices = number(slices), p.chunks = number(chunks), p.chain = number(chain);
  p.across = number(across), p.down = number(down);

  reduce_data_sums<T>(on, {tiles, slices, chain, down}, x, finish, parts, dweight, [&](float* sum_dy, float* sum_dy_xc) {
    p.sum_dy = sum_dy, p.sum_dy_xc = sum_dy_xc;
    on.run_shared(bytes, bn_act_conv3x3_data_bwd_kernel<T, N16>, chunks * slices, warps * 32, p);
  });
}

DataGradients bn_act_conv3x3_data_backward(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& shift,
                                           const Tensor& center, const Tensor& rstd, double count, double activation,
                                           const Tensor& weight, const Tensor& out, const Tensor& beta, const Tensor& delta,
                                           bool accumulate, const Optional& parts) {
  const Map from = map_of(x, "x"), g = map_of(grad, "grad"), to = mutable_map_of(out, "out");
  check_conv3x3_maps(x, from, grad, "grad", g, kConv3x3BackwardOutputs);
  check_same(out, "out", x, "x");
  check_conv3x3_weight(weight, g.C, x, from);
  check_norm(x, scale, shift, center, rstd, beta, delta);

  const Launch on(x);
  const std::tuple<Tensor, Tensor> gradients = new_sums(x, from);
  const auto& [dgamma, dbeta] = gradients;
  const Optional dweight = new_weight_gradient(parts, x, {g.C, 3, 3, from.C});
  const CorrectData finish = correct_data(scale, center, rstd, count, beta, delta, accumulate, gradients);
  if (from.numel() == 0) {
    no_data_sums(on, from, x, finish, parts, dweight);
    return {dgamma, dbeta, dweight};
  }
  check_rows(g, grad, "grad");
  check_rows(from, x, "x");
  check_rows(to, out, "out");
  check_few_rows(g, "grad");
  check_few_rows(from, "x");
  check_few_rows(to, "out");

  const Tensor weights = rows_of_taps(weight);
  dispatch_half_precision(from, [&](auto zero) {
    using T = decltype(zero);
    Conv3x3Data<T> p{};
    const auto map = [](const Map& m) {
      return Conv3x3DataMap<T>{static_cast<T*>(m.data), m.sn, static_cast<int>(m.ss)};
    };
    p.grad = map(g), p.x = map(from), p.out = map(to);
    p.scale = floats(scale), p.shift = floats(shift), p.center = floats(center);
    p.weight = static_cast<const T*>(weights.const_data_ptr());
    p.slope = slope_of(activation), p.accumulate = accumulate;
    p.channels = static_cast<int>(from.C), p.outputs = static_cast<int>(g.C);
    if (g.C <= 16)
      run_conv3x3_data<T, 1>(on, p, x, finish, parts, dweight);
    else
      run_conv3x3_data<T, 2>(on, p, x, finish, parts, dweight);
  });
  return {dgamma, dbeta, dweight};
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) { m.impl("bn_act_conv3x3_data_backward", TORCH_BOX(&bn_act_conv3x3_data_backward)); }

}  // namespace resdense::cuda
