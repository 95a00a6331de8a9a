#include "bn_act_conv1x1_weight.cuh"

#include "conv.h"
#include "splits.h"

namespace resdense::cuda {
namespace {

// A split takes at least so many chunks, as its part of the result is as large as some.
constexpr int64_t kWeightLeastChunks = 4;

template <typename T, int K64>
void run(const Launch& on, Conv1x1Weight<T> p, const Tensor& dweight) {
  using Tile = WeightTile<K64>;
  const int64_t chunks = ceil_div(p.rows, kWeightChunk), blocks = on.multiprocessors() * Tile::kBlocks;
  const int64_t tiles = ceil_div(p.channels, 64 * Tile::kPanels);
  const int64_t split_chunks = std::max(kWeightLeastChunks, ceil_div(chunks, std::max<int64_t>(1, blocks / tiles)));
  const int64_t splits = ceil_div(chunks, split_chunks);
  p.tiles = static_cast<int>(tiles), p.split_chunks = static_cast<int>(split_chunks);

  static_assert(Tile::kBytes <= 156 * 1024, "what resdense_ext.ops.vendor takes a device to need");
  run_in_splits<T>(on, splits, dweight, [&](float* parts) {
    p.parts = parts;
    on.run_shared(Tile::kBytes, bn_act_conv1x1_weight_bwd_kernel<T, K64>, splits * tiles, kWeightThreads, p);
  });
}

template <typename T>
void run(const Launch& on, const Conv1x1Weight<T>& p, const Tensor& dweight) {
  switch (ceil_div(p.outputs, 64)) {
    case 1: return run<T, 1>(on, p, dweight);
    case 2: return run<T, 2>(on, p, dweight);
    default: return run<T, 3>(on, p, dweight);
  }
}

Tensor bn_act_conv1x1_weight_backward(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& shift,
                                      double activation) {
  const Map from = map_of(x, "x"), of = map_of(grad, "grad");
  check_maps(x, from, kConv1x1Inputs, grad, "grad", of, kConv1x1Outputs);
  check_vector(scale, "scale", from.C, x, "x");
  check_vector(shift, "shift", from.C, x, "x");

  Tensor dweight = torch::stable::new_empty(x, {of.C, from.C});
  if (from.numel() == 0) {
    torch::stable::fill_(dweight, 0.0);
    return dweight;
  }
  check_matrix(from, x, "x");
  check_matrix(of, grad, "grad");

  const Launch on(x);
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
    run(on, p, dweight);
  });
  return dweight;
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) { m.impl("bn_act_conv1x1_weight_backward", TORCH_BOX(&bn_act_conv1x1_weight_backward)); }

}  // namespace resdense::cuda
