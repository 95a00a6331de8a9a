#include "fold.cuh"

#include <optional>
#include <tuple>

#include "common/folds.h"
#include "launch.h"

namespace resdense::cuda {
namespace {

template <typename W>
const W* values(const std::optional<Tensor>& v) {
  return v ? static_cast<const W*>(v->const_data_ptr()) : nullptr;
}

// f(of the vectors' type) for vectors of statistics.
template <typename F>
void by_type(const Tensor& like, F f) {
  like.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

std::tuple<Tensor, Tensor, Tensor> bn_fold(const Tensor& mean, const Tensor& m2, double count, double eps,
                                           const std::optional<Tensor>& weight, const std::optional<Tensor>& bias) {
  const int64_t C = mean.size(0);
  check_vector(mean, "mean", C, mean, "mean");
  check_vector(m2, "m2", C, mean, "mean");
  if (weight) check_vector(*weight, "weight", C, mean, "mean");
  if (bias) check_vector(*bias, "bias", C, mean, "mean");
  const auto vector = [&] { return empty_vector(C, mean.scalar_type(), mean); };
  const Tensor scale = vector(), shift = vector(), rstd = vector();
  if (C == 0) return {scale, shift, rstd};

  const Launch on(mean);
  by_type(mean, [&](auto zero) {
    using W = decltype(zero);
    const auto to = [](const Tensor& t) { return static_cast<W*>(t.mutable_data_ptr()); };
    on.run(bn_fold_kernel<W>, ceil_div(C, kFoldThreads), kFoldThreads, C, values<W>(mean), values<W>(m2), count, eps,
           values<W>(weight), values<W>(bias), to(scale), to(shift), to(rstd));
  });
  return {scale, shift, rstd};
}

Tensor bn_folds(std::vector<Tensor> mean, std::vector<Tensor> m2, std::vector<double> count, std::vector<double> eps,
                std::vector<Tensor> weight, std::vector<Tensor> bias) {
  const FoldSizes sizes = fold_sizes(mean, m2, count, eps, weight, bias);
  const Tensor folds = torch::stable::new_empty(mean[0], {3, sizes.total});
  if (sizes.total == 0) return folds;

  const Launch on(mean[0]);
  by_type(mean[0], [&](auto zero) {
    using W = decltype(zero);
    const auto from = [](const Tensor& t) { return static_cast<const W*>(t.const_data_ptr()); };
    const int64_t norms = static_cast<int64_t>(mean.size()), chunks = ceil_div(sizes.most, kFoldThreads);
    for (int64_t first = 0; first < norms; first += kFolds) {
      const int64_t some = std::min<int64_t>(kFolds, norms - first);
      FoldTable<W> table{};
      for (int64_t i = 0; i < some; ++i) {
        const int64_t at = first + i;
        table.mean[i] = from(mean[at]), table.m2[i] = from(m2[at]), table.weight[i] = from(weight[at]), table.bias[i] = from(bias[at]);
        table.count[i] = count[at], table.eps[i] = eps[at], table.start[i] = sizes.start[at];
        table.channels[i] = static_cast<int>(mean[at].size(0));
      }
      on.run(bn_folds_kernel<W>, some * chunks, kFoldThreads, table, chunks, sizes.total, static_cast<W*>(folds.mutable_data_ptr()));
    }
  });
  return folds;
}

Tensor bn_correction(const Tensor& sum_dy, const Tensor& sum_dy_xc, const Tensor& scale, const Tensor& mean,
                     const Tensor& rstd, double count, const Tensor& beta, const Tensor& delta, bool accumulate) {
  const int64_t C = mean.size(0);
  check_vector(sum_dy, "sum_dy", C, mean, "mean");
  check_vector(sum_dy_xc, "sum_dy_xc", C, mean, "mean");
  check_vector(scale, "scale", C, mean, "mean");
  check_vector(mean, "mean", C, mean, "mean");
  check_vector(rstd, "rstd", C, mean, "mean");
  check_vector(beta, "beta", C, mean, "mean");
  check_vector(delta, "delta", C, mean, "mean");
  const Tensor dgamma = empty_vector(C, mean.scalar_type(), mean);
  if (C == 0) return dgamma;

  const Launch on(mean);
  by_type(mean, [&](auto zero) {
    using W = decltype(zero);
    const auto to = [](const Tensor& t) { return static_cast<W*>(t.mutable_data_ptr()); };
    const Correction<W> correct{values<W>(scale), values<W>(mean), values<W>(rstd), count,
                                to(beta),         to(delta),       to(dgamma),      accumulate};
    on.run(bn_correction_kernel<W>, ceil_div(C, kFoldThreads), kFoldThreads, C, values<W>(sum_dy), values<W>(sum_dy_xc), correct);
  });
  return dgamma;
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) {
  m.impl("bn_fold", TORCH_BOX(&bn_fold));
  m.impl("bn_folds", TORCH_BOX(&bn_folds));
  m.impl("bn_correction", TORCH_BOX(&bn_correction));
}

}  // namespace resdense::cuda
