#pragma once
// What the launchers of convolutions' weight gradients share.

#include <tuple>

#include "conv.h"
#include "conv_weight.cuh"

namespace resdense::cuda {

namespace {  // no symbols: those of its tensors are hidden

// A gradient that may be pending on z: then its vectors, at aligned addresses, and a map for what is finished, a new one unless it is to
// be overwritten.
class Pending {
 public:
  Pending(const Tensor& grad, const Optional& z, const Optional& alpha, const Optional& beta, const Optional& delta, bool overwrite)
      : grad_(grad), z_(z) {
    RESDENSE_CHECK(z ? alpha && beta && delta : !alpha && !beta && !delta,
                   "alpha, beta, delta: expected all of them with z, and none without it");
    if (!z) return;
    check_same(*z, "z", grad, "grad");
    alpha_ = aligned_vector(*alpha, "alpha", grad), beta_ = aligned_vector(*beta, "beta", grad);
    delta_ = aligned_vector(*delta, "delta", grad);
    if (!overwrite) finished_ = torch::stable::empty_like(grad);
  }

  const Optional& finished() const { return finished_; }

  template <typename T>
  PendingGrad<T> on_device() const {
    if (!z_) return {};
    const Tensor& finished = finished_ ? *finished_ : grad_;
    const Map from = map_of(*z_, "z"), to = mutable_map_of(finished, "finished");
    check_rows(to, finished, "finished");
    return {static_cast<const T*>(from.data), static_cast<T*>(to.data), from.sn, from.ss, to.sn, to.ss,
            floats(alpha_), floats(beta_), floats(delta_)};
  }

 private:
  static Optional aligned_vector(const Tensor& v, const char* name, const Tensor& grad) {
    check_vector(v, name, grad.size(1), grad, "grad");
    return at_aligned_address(v);
  }

  const Tensor& grad_;
  Optional z_, alpha_, beta_, delta_, finished_;
};

}  // namespace

// The parts that the splits have left, [splits] of such sizes, and the gradient once it is finished, where that is a new map.
using WeightParts = std::tuple<Optional, Optional>;

inline Tensor new_parts(const Tensor& x, int64_t splits, std::vector<int64_t> sizes) {
  sizes.insert(sizes.begin(), splits);
  return torch::stable::new_empty(x, sizes, ScalarType::Float);
}

}  // namespace resdense::cuda
