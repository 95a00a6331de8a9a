// The vectors of batch norm: what its statistics and parameters amount to forward, and what its sums amount to backward. They
// are short; as strings of framework operations they would cost more than the passes over small maps.

#include <cmath>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "common/folds.h"
#include "common/memory.h"
#include "stats.h"

namespace resdense::cpu {
namespace {

// f(of the vectors' type) for a vector of statistics.
template <class F> auto by_type(const Tensor& like, const F& f) {
  return like.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

template <class A> const A* optional_vector(const std::optional<Tensor>& v, const char* name, const Tensor& like) {
  return v ? static_cast<const A*>(coefficients(*v, name, like.size(0), like)) : nullptr;
}

template <class A>
void fold(const Tensor& mean, const Tensor& m2, double count, double eps, const std::optional<Tensor>& weight,
          const std::optional<Tensor>& bias, A* scale, A* shift, A* rstd) {
  const int64_t C = mean.size(0);
  const A* m = static_cast<const A*>(coefficients(mean, "mean", C, mean));
  const A* squares = static_cast<const A*>(coefficients(m2, "m2", C, mean));
  const A* gamma = optional_vector<A>(weight, "weight", mean);
  const A* beta = optional_vector<A>(bias, "bias", mean);
  for (int64_t c = 0; c < C; ++c) {
    const double inverse = 1 / std::sqrt(squares[c] / count + eps);
    scale[c] = static_cast<A>(gamma ? gamma[c] * inverse : inverse);
    shift[c] = static_cast<A>((beta ? beta[c] : A(0)) - m[c] * static_cast<double>(scale[c]));
    rstd[c] = static_cast<A>(inverse);
  }
}

}  // namespace

// Scale, shift and rstd of a norm over `count` positions, from their mean and sum of squared deviations.
std::tuple<Tensor, Tensor, Tensor> bn_fold(const Tensor& mean, const Tensor& m2, double count, double eps,
                                           const std::optional<Tensor>& weight, const std::optional<Tensor>& bias) {
  const auto vector = [&] { return empty_vector(mean.size(0), mean.scalar_type(), mean); };
  const Tensor scale = vector(), shift = vector(), rstd = vector();
  by_type(mean, [&](auto type) {
    const auto to = [](const Tensor& v) { return static_cast<decltype(type)*>(v.mutable_data_ptr()); };
    fold(mean, m2, count, eps, weight, bias, to(scale), to(shift), to(rstd));
  });
  return {scale, shift, rstd};
}

// Those of many norms: see csrc/bindings.cpp.
Tensor bn_folds(std::vector<Tensor> mean, std::vector<Tensor> m2, std::vector<double> count, std::vector<double> eps,
                std::vector<Tensor> weight, std::vector<Tensor> bias) {
  const FoldSizes sizes = fold_sizes(mean, m2, count, eps, weight, bias);
  const Tensor folds = torch::stable::new_zeros(mean[0], {3, sizes.total});
  by_type(mean[0], [&](auto type) {
    auto* rows = static_cast<decltype(type)*>(folds.mutable_data_ptr());
    for (size_t i = 0; i < mean.size(); ++i) {
      auto* scale = rows + sizes.start[i];
      fold(mean[i], m2[i], count[i], eps[i], weight[i], bias[i], scale, scale + sizes.total, scale + 2 * sizes.total);
    }
  });
  return folds;
}

// From the sums of dy and of dy * (x - mean): returns dgamma, and writes to beta and delta, or adds to them, the norm's
// correction of the gradient of its input, which is beta * x + delta.
Tensor bn_correction(const Tensor& sum_dy, const Tensor& sum_dy_xc, const Tensor& scale, const Tensor& mean, const Tensor& rstd,
                     double count, const Tensor& beta, const Tensor& delta, bool accumulate) {
  const int64_t C = mean.size(0);
  const Tensor dgamma = empty_vector(C, mean.scalar_type(), mean);
  by_type(mean, [&](auto type) {
    using A = decltype(type);
    const auto vector = [&](const Tensor& v, const char* name) {
      return static_cast<const A*>(coefficients(v, name, C, mean));
    };
    const A *dy = vector(sum_dy, "sum_dy"), *dy_xc = vector(sum_dy_xc, "sum_dy_xc"), *s = vector(scale, "scale"),
            *m = vector(mean, "mean"), *r = vector(rstd, "rstd");
    A* b = const_cast<A*>(vector(beta, "beta"));
    A* d = const_cast<A*>(vector(delta, "delta"));
    A* g = static_cast<A*>(dgamma.mutable_data_ptr());
    for (int64_t c = 0; c < C; ++c) {
      const double shared = s[c] / count, dg = static_cast<double>(r[c]) * dy_xc[c], slope = -shared * r[c] * dg;
      g[c] = static_cast<A>(dg);
      const A to_beta = static_cast<A>(slope), to_delta = static_cast<A>(-(shared * dy[c] + slope * m[c]));
      b[c] = accumulate ? b[c] + to_beta : to_beta;
      d[c] = accumulate ? d[c] + to_delta : to_delta;
    }
  });
  return dgamma;
}

}  // namespace resdense::cpu

STABLE_TORCH_LIBRARY_IMPL(resdense, CPU, m) {
  m.impl("bn_fold", TORCH_BOX(&resdense::cpu::bn_fold));
  m.impl("bn_folds", TORCH_BOX(&resdense::cpu::bn_folds));
  m.impl("bn_correction", TORCH_BOX(&resdense::cpu::bn_correction));
}
