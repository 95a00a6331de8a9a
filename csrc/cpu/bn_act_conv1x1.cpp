// A 1x1 convolution with batch norm and activation as its prologue, and its backward, a cache-sized tile at a time: a tile
// of the input is activated in scratch, multiplied at once, and what belongs to the result (bias, statistics; mask, sums,
// accumulation) is done while it is still in the cache. Nothing of the size of the input is allocated.

#include <torch/csrc/stable/library.h>

#include "matmul.h"
#include "stats.h"

namespace resdense::cpu {
namespace {

// Products of bfloat16 tiles without the framework; `depth` is the number of channels that are added up.
bool by_pairs(const Map& x, const Matrix& w, int64_t cols, int64_t depth) {
  return resdense::cpu::by_pairs(x, cols, depth) && !kernels.matrix_tiles && w.col_stride == 1 && w.row_stride == w.cols;
}

// Adds a tile's product, computed in a 16-bit dtype, to the float32 accumulator.
void widen_and_add(float* sum, const void* product, int64_t count, ScalarType dtype) {
  if (dtype == ScalarType::BFloat16)
    for (int64_t i = 0; i < count; ++i) sum[i] += static_cast<const c10::BFloat16*>(product)[i];
  else
    for (int64_t i = 0; i < count; ++i) sum[i] += static_cast<const c10::Half*>(product)[i];
}

// The chunks' weight gradients, added up in order; the first is in the result.
template <class A> void total_weight(const Scratch& others, int64_t chunks, int64_t count, const Tensor& result) {
  A* sum = static_cast<A*>(result.mutable_data_ptr());
  if (chunks == 0) std::fill_n(sum, count, A(0));
  torch::stable::parallel_for(0, count, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = 1; chunk < chunks; ++chunk)
      for (int64_t i = begin; i < end; ++i) sum[i] += others.of<A>(chunk - 1)[i];
  });
}

}  // namespace

std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>> bn_act_conv1x1(
    const Tensor& x, const Tensor& scale, const Tensor& shift, double activation, const Tensor& weight,
    const std::optional<Tensor>& bias, const Tensor& out, const std::optional<Tensor>& mean, const std::optional<Tensor>& m2,
    std::optional<double> eps, const std::optional<Tensor>& reader_weight, const std::optional<Tensor>& reader_bias) {
  Map from = map_of(x, "x"), to = mutable_map_of(out, "out");
  check_dtype(out, "out", from.dtype);
  check_positions(to, "out", from);
  unify({&from, &to}, "bn_act_conv1x1");
  const ScalarType dtype = from.dtype;
  const bool last = from.channels_last;
  check_stats(mean, m2, out);
  check_reader(eps, reader_weight, reader_bias, mean, out);
  const int64_t C = from.C, K = to.C, bytes = element_size(dtype);
  Matrix w = matrix_of(weight, "weight", K, C, dtype);
  const bool paired = by_pairs(from, w, K, C), packs = paired || (last && by_gemm(dtype, K));
  const Scratch panels(1, packs ? C * K * bytes : 0);
  if (paired) w.cols = w.row_stride = C / 2;
  if (packs) w = pack(w.t(), panels.of<uint32_t>(0)).t();
  const void* a = coefficients(scale, "scale", C, x);
  const void* b = coefficients(shift, "shift", C, x);
  const std::vector<double> zeros(bias ? 0 : K, 0.0);  // as float32, too
  const void* offset = bias ? coefficients(*bias, "bias", K, out) : zeros.data();

  const bool direct = is_matrix(to);  // then the product is written where it belongs
  const Tiling tiling(from, (C + K) * bytes, K * C * bytes, Tiling::least_of_products(K * C));
  const Scratch scratch_memory(tiling.chunks, (C + (direct ? 0 : K)) * tiling.size * bytes);
  Stats statistics(mean ? tiling.chunks : 0, to);
  tiling.each([&](int64_t chunk, int64_t tile, int64_t positions, const std::vector<Segment>& segments) {
    char* activated = scratch_memory.of<char>(chunk);
    Upcoming upcoming(tiling.behind(chunk, tile), {&from, &to});
    const Matrix product =
        direct ? tile_of(to, tiling, tile)
               : channels_by_positions(activated + C * tiling.size * bytes, last, K, positions, tiling.size);
    Sweep s{Pass::act, dtype, last, segments.data(), static_cast<int64_t>(segments.size()), C};
    s.in[0] = operand(from), s.out = scratch(activated, last, C, tiling.size);
    s.coef[0] = a, s.coef[1] = b, s.activation = activation;
    kernels.sweep(s);

    if (paired)
      kernels.gemm_bf16({nullptr, activated, w.data, positions, K, C / 2, product.col_stride, C / 2, 1, K, true, nullptr, 0,
                         product.data, upcoming.ahead()});
    else
      matmul(product, w, channels_by_positions(activated, last, C, positions, tiling.size), dtype, upcoming.ahead());

    if (bias || !direct) {
      s.pass = Pass::bias, s.channels = K;
      s.in[0] = direct ? operand(to) : scratch(product.data, last, K, tiling.size), s.out = operand(to), s.coef[0] = offset;
      kernels.sweep(s);
    }
    if (mean) statistics.add(chunk, segments, positions, last, operand(to));
  });
  if (mean) statistics.total(to, *mean, *m2);
  if (!eps) return {};
  return bn_fold(*mean, *m2, static_cast<double>(to.rows()), *eps, reader_weight, reader_bias);
}

std::tuple<Tensor, Tensor, Tensor> bn_act_conv1x1_backward(
    const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& center, double activation,
    const Tensor& weight, const Tensor& dy, const Tensor& z, const Tensor& alpha, const Tensor& beta, const Tensor& delta,
    const Tensor& out, bool accumulate, bool need_weight) {
  check_same(out, "out", x, "x");
  check_same(z, "z", dy, "dy");
  check_dtype(dy, "dy", x.scalar_type());
  Map from = map_of(x, "x"), to = mutable_map_of(out, "out"), grad = map_of(dy, "dy"), raw = map_of(z, "z");
  check_positions(grad, "dy", from);
  unify({&from, &to, &grad, &raw}, "bn_act_conv1x1_backward");
  const ScalarType dtype = from.dtype;
  const bool last = from.channels_last;
  const int64_t C = from.C, K = grad.C, bytes = element_size(dtype);
  Matrix w = matrix_of(weight, "weight", K, C, dtype);
  const bool paired = by_pairs(from, w, C, K), packs = last && by_gemm(dtype, C), narrow = bytes == 2 && !paired;
  const Scratch w_copy(1, paired || packs ? C * K * bytes : 0);
  if (paired) kernels.pair_rows(w.data, K, C, C, w_copy.of(0));
  if (packs) w = pack(w, w_copy.of<uint32_t>(0));
  const void* act_coef[] = {coefficients(scale, "scale", C, x), coefficients(shift, "shift", C, x),
                            coefficients(center, "center", C, x)};
  const void* grad_coef[] = {coefficients(alpha, "alpha", K, dy), coefficients(beta, "beta", K, dy),
                             coefficients(delta, "delta", K, dy)};

  const bool twice = paired && need_weight;  // a tile is there as rows and as pairs of rows
  const Tiling tiling(from, (C + K) * bytes * (twice ? 2 : 1), K * C * bytes);
  const int64_t tile_bytes = (C + K) * tiling.size * bytes;
  const Scratch scratch_memory(tiling.chunks, twice ? 2 * tile_bytes : tile_bytes + (need_weight && narrow ? K * C * bytes : 0));
  const bool wide = dtype == ScalarType::Double;
  const Tensor dweight = torch::stable::empty({need_weight ? K : 0, C}, stats_dtype(dtype));
  const Scratch others(need_weight ? std::max<int64_t>(tiling.chunks, 1) - 1 : 0, K * C * (wide ? 8 : 4));
  std::vector<char> started(tiling.chunks, 0);
  Sums sums(tiling.chunks, C);
  tiling.each([&](int64_t chunk, int64_t tile, int64_t positions, const std::vector<Segment>& segments) {
    Upcoming upcoming(tiling.behind(chunk, tile), {&grad, &raw, &from, &to});
    char* input = scratch_memory.of<char>(chunk);
    char* dz = input + C * tiling.size * bytes;
    const Matrix dz_matrix = channels_by_positions(dz, last, K, positions, tiling.size);
    const Matrix input_matrix = channels_by_positions(input, last, C, positions, tiling.size);
    Sweep s{Pass::pending, dtype, last, segments.data(), static_cast<int64_t>(segments.size()), K};
    s.in[0] = operand(grad), s.in[1] = operand(raw), s.out = scratch(dz, last, K, tiling.size);
    std::copy_n(grad_coef, 3, s.coef);
    kernels.sweep(s);

    s.channels = C, s.activation = activation;
    std::copy_n(act_coef, 3, s.coef);
    if (need_weight) {
      s.pass = Pass::act, s.in[0] = operand(from), s.out = scratch(input, last, C, tiling.size);
      kernels.sweep(s);
      void* const total = chunk == 0 ? dweight.mutable_data_ptr() : others.of(chunk - 1);
      const Matrix sum{total, K, C, C, 1};
      if (paired) {
        char* input_pairs = input + tile_bytes;
        char* dz_pairs = input_pairs + C * tiling.size * bytes;
        kernels.pair_rows(input, positions, C, C, input_pairs);
        kernels.pair_rows(dz, positions, K, K, dz_pairs);
        float* const values = static_cast<float*>(total);
        kernels.gemm_bf16({values, dz_pairs, input_pairs, K, C, (positions + 1) / 2, C, 1, K, C, false,
                           started[chunk] ? values : nullptr, C, nullptr, upcoming.ahead()});
      } else if (narrow) {
        char* product = dz + K * tiling.size * bytes;
        if (!started[chunk]) std::fill_n(static_cast<float*>(total), K * C, 0.0f);
        matmul({product, K, C, C, 1}, dz_matrix, input_matrix.t(), dtype);
        widen_and_add(static_cast<float*>(total), product, K * C, dtype);
      } else if (started[chunk]) {
        matmul_accumulate(sum, dz_matrix, input_matrix.t(), dtype, upcoming.ahead());
      } else {
        matmul(sum, dz_matrix, input_matrix.t(), dtype, upcoming.ahead());
      }
      started[chunk] = 1;
    }

    // The data gradient takes the place of the activated input.
    if (paired)
      kernels.gemm_bf16({nullptr, dz, w_copy.of(0), positions, C, K / 2, C, K / 2, 1, C, false, nullptr, 0, input,
                         upcoming.ahead()});
    else
      matmul(input_matrix, w.t(), dz_matrix, dtype, upcoming.ahead());
    s.pass = accumulate ? Pass::mask_accumulate : Pass::mask;
    s.in[0] = scratch(input, last, C, tiling.size), s.in[1] = operand(from), s.in[2] = operand(to), s.out = operand(to);
    s.sums[0] = sums.of(chunk, 0), s.sums[1] = sums.of(chunk, 1);
    kernels.sweep(s);
  });

  if (need_weight) {
    const auto add_up = wide ? total_weight<double> : total_weight<float>;
    add_up(others, tiling.chunks, K * C, dweight);
  }
  return {dweight, sums.total(0, from), sums.total(1, from)};
}

}  // namespace resdense::cpu

STABLE_TORCH_LIBRARY_IMPL(resdense, CPU, m) {
  m.impl("bn_act_conv1x1", TORCH_BOX(&resdense::cpu::bn_act_conv1x1));
  m.impl("bn_act_conv1x1_backward", TORCH_BOX(&resdense::cpu::bn_act_conv1x1_backward));
}
