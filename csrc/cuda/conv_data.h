#pragma once
// What the launchers of convolutions' data gradients share.

#include <tuple>
#include <vector>

#include "conv.h"
#include "conv_data.cuh"
#include "reduce.h"

namespace resdense::cuda {

// dgamma, dbeta, and dweight where a weight gradient has left its parts.
using DataGradients = std::tuple<Optional, Optional, Optional>;

// How tiles of positions are shared out: a block has every slices-th, of which so many `warps` add up the same channels, and
// leave their sums every `chain` tiles and at the end.
struct DataShare {
  int64_t tiles, slices, chain, warps;
};

// The vectors of the norm of x and of its correction.
inline void check_norm(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& center, const Tensor& rstd,
                       const Tensor& beta, const Tensor& delta) {
  const int64_t channels = x.size(1);
  check_vector(scale, "scale", channels, x, "x");
  check_vector(shift, "shift", channels, x, "x");
  check_vector(center, "center", channels, x, "x");
  check_vector(rstd, "rstd", channels, x, "x");
  check_vector(beta, "beta", channels, x, "x");
  check_vector(delta, "delta", channels, x, "x");
}

// What the second stage makes of the sums, `gradients` (dgamma and dbeta) among it.
inline CorrectData correct_data(const Tensor& scale, const Tensor& center, const Tensor& rstd, double count, const Tensor& beta,
                                const Tensor& delta, bool accumulate, const std::tuple<Tensor, Tensor>& gradients) {
  const auto& [dgamma, dbeta] = gradients;
  return {{floats(scale), floats(center), floats(rstd), count, mutable_floats(beta), mutable_floats(delta), mutable_floats(dgamma),
           accumulate},
          mutable_floats(dbeta)};
}

// The weight's gradient, of these sizes, of which a weight gradient has left `parts`: nothing where it has not run.
inline Optional new_weight_gradient(const Optional& parts, const Tensor& x, const std::vector<int64_t>& sizes) {
  if (!parts) return std::nullopt;
  bool right = parts->dim() == static_cast<int64_t>(sizes.size()) + 1;
  for (size_t i = 0; right && i < sizes.size(); ++i) right = parts->size(i + 1) == sizes[i];
  RESDENSE_CHECK(right && parts->is_contiguous(), "parts: expected what this convolution's weight gradient has left, got shape ",
                 shape_string(*parts), " with strides ", stride_string(*parts));
  check_dtype(*parts, "parts", ScalarType::Float);
  check_same_device(*parts, "parts", x, "x");
  return torch::stable::new_empty(x, sizes);
}

// Both stages of the sums: start(sum_dy, sum_dy_xc) launches the convolution, whose warps leave theirs there. The second one adds up
// the parts of the weight's gradient, too.
template <typename T, typename F>
inline void reduce_data_sums(const Launch& on, const DataShare& share, const Tensor& x, const CorrectData& finish,
                             const Optional& parts, const Optional& dweight, F start) {
  const int64_t round = share.slices * share.chain, channels = x.size(1);
  const int64_t left = std::min(share.tiles % round, share.slices);
  const int64_t chunks = (share.tiles / round * share.slices + left) * share.warps;
  const Tensor memory = torch::stable::new_empty(x, {2, chunks, channels}, ScalarType::Float);
  float *const first = mutable_floats(memory), *const second = first + chunks * channels;
  start(first, second);
  Splits<T> splits{};
  if (dweight)
    splits = {floats(*parts), static_cast<int>(parts->size(0)), dweight->numel(), static_cast<T*>(dweight->mutable_data_ptr())};
  const int64_t split_blocks = ceil_div(splits.size, kSplitValues);
  on.run(conv_backward_finish_kernel<T>, split_blocks + finish_blocks(channels), kReduceThreads, splits, split_blocks,
         Chunks<Sums<float, 1>>{first, second, channels, chunks, 1, chunks}, finish);
}

// Those of no positions.
inline void no_data_sums(const Launch& on, const Map& m, const Tensor& x, const CorrectData& finish, const Optional& parts,
                         const Optional& dweight) {
  dispatch_half_precision(m, [&](auto zero) {
    reduce_data_sums<decltype(zero)>(on, {0, 1, 1, 1}, x, finish, parts, dweight, [](float*, float*) {});
  });
}

}  // namespace resdense::cuda
