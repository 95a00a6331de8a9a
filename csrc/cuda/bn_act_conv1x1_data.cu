#include "bn_act_conv1x1_data.cuh"

#include <tuple>

#include "conv_data.h"

namespace resdense::cuda {
namespace {

template <typename T>
DataRows<T> data_rows_of(const Map& m) {
  return {static_cast<T*>(m.data), static_cast<unsigned>(m.ss * sizeof(T))};
}

template <typename T, int N64>
void run_conv1x1_data(const Launch& on, Conv1x1Data<T> p, const Tensor& x, const CorrectData& finish, const Optional& parts,
                      const Optional& dweight) {
  using Tile = DataTile<N64>;
  const int64_t memory = on.shared_memory(), multiprocessors = on.multiprocessors();
  const int64_t tiles = ceil_div(p.positions, kDataPositions), groups = ceil_div(p.channels, kDataChannels);
  const int maps = p.accumulate ? 2 : 1;

  // Few chunks, as each reads the gradients; more where there are fewer tiles than multiprocessors.
  int most = Tile::kWarps;
  while (Tile::bytes(most, maps) + 1024 > memory) --most;
  const int64_t chunks = std::clamp(multiprocessors / tiles, ceil_div(groups, most), groups);
  const int warps = static_cast<int>(ceil_div(groups, chunks));
  const int64_t bytes = Tile::bytes(warps, maps);
  const int64_t blocks = std::min<int64_t>(Tile::kBlocks * Tile::kWarps / warps, memory / (bytes + 1024));
  const int64_t slices = std::clamp<int64_t>(multiprocessors * blocks / chunks, 1, tiles);
  p.tiles = static_cast<int>(tiles), p.slices = static_cast<int>(slices), p.chunks = static_cast<int>(chunks);

  reduce_data_sums<T>(on, {tiles, slices, kDataChain, 1}, x, finish, parts, dweight, [&](float* sum_dy, float* sum_dy_xc) {
    p.sum_dy = sum_dy, p.sum_dy_xc = sum_dy_xc;
    on.run_shared(bytes, bn_act_conv1x1_data_bwd_kernel<T, N64>, chunks * slices, warps * 32, p);
  });
}

DataGradients bn_act_conv1x1_data_backward(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& shift,
                                           const Tensor& center, const Tensor& rstd, double count, double activation,
                                           const Tensor& weight, const Tensor& out, const Tensor& beta, const Tensor& delta,
                                           bool accumulate, const Optional& parts) {
  const Map from = map_of(x, "x"), g = map_of(grad, "grad"), to = mutable_map_of(out, "out");
  check_maps(x, from, kConv1x1Inputs, grad, "grad", g, kConv1x1Outputs);
  check_same(out, "out", x, "x");
  RESDENSE_CHECK(weight.dim() == 2 && weight.size(0) == g.C && weight.size(1) == from.C,
                 "weight: expected shape (", g.C, ", ", from.C, "), got ", shape_string(weight));
  check_dtype(weight, "weight", from.dtype);
  check_same_device(weight, "weight", x, "x");
  check_norm(x, scale, shift, center, rstd, beta, delta);

  const Launch on(x);
  const std::tuple<Tensor, Tensor> gradients = new_sums(x, from);
  const auto& [dgamma, dbeta] = gradients;
  const Optional dweight = new_weight_gradient(parts, x, {g.C, from.C});
  const CorrectData finish = correct_data(scale, center, rstd, count, beta, delta, accumulate, gradients);
  if (from.numel() == 0) {
    no_data_sums(on, from, x, finish, parts, dweight);
    return {dgamma, dbeta, dweight};
  }
  check_matrix(g, grad, "grad");
  check_matrix(from, x, "x");
  check_matrix(to, out, "out");

  const Tensor weights = at_aligned_address(torch::stable::contiguous(weight));
  dispatch_half_precision(from, [&](auto zero) {
    using T = decltype(zero);
    Conv1x1Data<T> p{};
    p.grad = data_rows_of<const T>(g), p.x = data_rows_of<const T>(from), p.out = data_rows_of<T>(to);
    p.scale = floats(scale), p.shift = floats(shift), p.center = floats(center);
    p.weight = static_cast<const T*>(weights.const_data_ptr());
    p.slope = slope_of(activation), p.accumulate = accumulate;
    p.positions = static_cast<int>(from.rows());
    p.channels = static_cast<int>(from.C), p.outputs = static_cast<int>(g.C);
    switch (ceil_div(g.C, 64)) {
      case 1: return run_conv1x1_data<T, 1>(on, p, x, finish, parts, dweight);
      case 2: return run_conv1x1_data<T, 2>(on, p, x, finish, parts, dweight);
      default: return run_conv1x1_data<T, 3>(on, p, x, finish, parts, dweight);
    }
  });
  return {dgamma, dbeta, dweight};
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) { m.impl("bn_act_conv1x1_data_backward", TORCH_BOX(&bn_act_conv1x1_data_backward)); }

}  // namespace resdense::cuda
