#include "bn_act_conv1x1_data.cuh"

#include <tuple>

#include "launch.h"
#include "reduce.h"

namespace resdense::cuda {
namespace {

constexpr int64_t kMostDataOutputs = 192, kMostDataChannels = int64_t(1) << 20;
// Positions, and elements from one to the next: the numbers of those ahead, and strides in bytes, are 32-bit ones.
constexpr int64_t kMostData = int64_t(1) << 30;

template <typename T>
DataRows<T> data_rows_of(const Map& m) {
  return {static_cast<T*>(m.data), static_cast<unsigned>(m.ss * sizeof(T))};
}

template <typename T, int N64>
void run_conv1x1_data(const Launch& on, Conv1x1Data<T> p, const std::tuple<Tensor, Tensor>& sums) {
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

  // Every kDataChain tiles of a slice leave a part, and so does what remains of them.
  const int64_t round = slices * kDataChain;
  ReducePlan parts{};
  parts.share.channels = p.channels;
  parts.share.chunk_items = parts.item_positions = 1;
  parts.share.items = parts.chunks = tiles / round * slices + std::min(tiles % round, slices);
  reduce<Sums<float, 1>>(on, parts, std::get<0>(sums), std::get<1>(sums), [&](float* sum_dy, float* sum_dy_xc) {
    p.sum_dy = sum_dy, p.sum_dy_xc = sum_dy_xc;
    on.run_shared(bytes, bn_act_conv1x1_data_bwd_kernel<T, N64>, chunks * slices, warps * 32, p);
  });
}

void check_data_rows(const Map& m, const Tensor& t, const char* name) {
  RESDENSE_CHECK(m.uniform_rows() && m.ss % 8 == 0 && aligned(m.data), name,
                 ": expected channels_last with one stride between positions, the channels of each aligned to 16 "
                 "bytes, got strides ", stride_string(t), aligned(m.data) ? "" : " at an address that is not aligned");
  RESDENSE_CHECK(m.rows() <= kMostData && m.ss <= kMostData, name,
                 ": expected at most 2^30 positions, and elements from one to the next, got ", m.rows(), " and ", m.ss);
}

std::tuple<Tensor, Tensor> bn_act_conv1x1_data_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                        const Tensor& shift, const Tensor& center,
                                                        double negative_slope, const Tensor& weight, const Tensor& out,
                                                        bool accumulate) {
  const Map from = map_of(x, "x"), g = map_of(grad, "grad"), to = mutable_map_of(out, "out");
  RESDENSE_CHECK(from.dtype == ScalarType::BFloat16 || from.dtype == ScalarType::Half,
                 "x: expected dtype bfloat16 or float16, got ", dtype_name(from.dtype));
  RESDENSE_CHECK(from.C > 0 && from.C % 8 == 0 && from.C <= kMostDataChannels,
                 "x: expected a multiple of 8 channels, at most ", kMostDataChannels, ", got ", from.C);
  check_dtype(grad, "grad", from.dtype);
  check_same_device(grad, "grad", x, "x");
  bool same = grad.dim() == x.dim() && g.N == from.N;
  for (int64_t i = 2; same && i < x.dim(); ++i) same = grad.size(i) == x.size(i);
  RESDENSE_CHECK(same, "grad: expected the samples and positions of x, whose shape is ", shape_string(x),
                 ", got shape ", shape_string(grad));
  RESDENSE_CHECK(g.C > 0 && g.C % 8 == 0 && g.C <= kMostDataOutputs,
                 "grad: expected a multiple of 8 channels, at most ", kMostDataOutputs, ", got ", g.C);
  check_same(out, "out", x, "x");
  RESDENSE_CHECK(weight.dim() == 2 && weight.size(0) == g.C && weight.size(1) == from.C,
                 "weight: expected shape (", g.C, ", ", from.C, "), got ", shape_string(weight));
  check_dtype(weight, "weight", from.dtype);
  check_same_device(weight, "weight", x, "x");
  check_vector(scale, "scale", from.C, x, "x");
  check_vector(shift, "shift", from.C, x, "x");
  check_vector(center, "center", from.C, x, "x");
  if (from.numel() == 0) return new_sums(x, from);
  check_data_rows(g, grad, "grad");
  check_data_rows(from, x, "x");
  check_data_rows(to, out, "out");

  const std::tuple<Tensor, Tensor> sums = new_sums(x, from);
  const Launch on(x);
  Tensor weights = torch::stable::contiguous(weight);
  if (!aligned(weights.const_data_ptr())) weights = torch::stable::clone(weights);
  const auto start = [&](auto zero) {
    using T = decltype(zero);
    const auto vector = [](const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); };
    Conv1x1Data<T> p{};
    p.grad = data_rows_of<const T>(g), p.x = data_rows_of<const T>(from), p.out = data_rows_of<T>(to);
    p.scale = vector(scale), p.shift = vector(shift), p.center = vector(center);
    p.weight = static_cast<const T*>(weights.const_data_ptr());
    p.slope = static_cast<float>(negative_slope), p.accumulate = accumulate;
    p.positions = static_cast<int>(from.rows());
    p.channels = static_cast<int>(from.C), p.outputs = static_cast<int>(g.C);
    switch (ceil_div(g.C, 64)) {
      case 1: return run_conv1x1_data<T, 1>(on, p, sums);
      case 2: return run_conv1x1_data<T, 2>(on, p, sums);
      default: return run_conv1x1_data<T, 3>(on, p, sums);
    }
  };
  if (from.dtype == ScalarType::Half)
    start(__half{});
  else
    start(__nv_bfloat16{});
  return sums;
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) { m.impl("bn_act_conv1x1_data_backward", TORCH_BOX(&bn_act_conv1x1_data_backward)); }

}  // namespace resdense::cuda
