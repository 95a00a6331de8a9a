#pragma once
// What the launchers of convolutions' data gradients share.

#include <tuple>

#include "conv.h"
#include "conv_data.cuh"
#include "reduce.h"

namespace resdense::cuda {

// How tiles of positions are shared out: a block has every slices-th, of which so many `warps` add up the same channels, and
// leave their sums every `chain` tiles and at the end.
struct DataShare {
  int64_t tiles, slices, chain, warps;
};

inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

inline float* mutable_floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

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

// Both stages of the sums: start(sum_dy, sum_dy_xc) launches the convolution, whose warps leave theirs there.
template <typename F>
inline void reduce_data_sums(const Launch& on, const DataShare& share, const Tensor& x, const CorrectData& finish, F start) {
  const int64_t round = share.slices * share.chain;
  const int64_t left = std::min(share.tiles % round, share.slices);
  ReducePlan parts{};
  parts.share.channels = x.size(1);
  parts.share.chunk_items = parts.item_positions = 1;
  parts.share.items = parts.chunks = (share.tiles / round * share.slices + left) * share.warps;
  reduce<Sums<float, 1>>(on, parts, x, start, finish);
}

// Those of no positions.
inline void no_data_sums(const Launch& on, const Tensor& x, const CorrectData& finish) {
  reduce_data_sums(on, {0, 1, 1, 1}, x, finish, [](float*, float*) {});
}

}  // namespace resdense::cuda
