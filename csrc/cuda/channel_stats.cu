#include "channel_stats.cuh"

#include <tuple>

#include "reduce.h"

namespace resdense::cuda {
namespace {

void channel_stats_into(const Tensor& x, const Tensor& mean, const Tensor& m2) {
  const Map m = map_of(x, "x");
  check_vector(mean, "mean", m.C, x, "x");
  check_vector(m2, "m2", m.C, x, "x");
  if (m.numel() == 0) {
    // The mean of nothing is not a number, as in torch.
    torch::stable::fill_(mean, std::numeric_limits<double>::quiet_NaN());
    torch::stable::fill_(m2, 0.0);
    return;
  }
  const Launch on(x);
  const ReducePlan p = plan_reduce({m}, on.multiprocessors());
  dispatch(m.dtype, [&](auto zero) {
    using T = decltype(zero);
    using W = wide_t<T>;
    constexpr int VEC = kVector<T>;
    const auto rows = p.vectors ? channel_stats_kernel<T, VEC, true> : channel_stats_kernel<T, 1, true>;
    const auto planes = p.vectors ? channel_stats_kernel<T, VEC, false> : channel_stats_kernel<T, 1, false>;
    reduce<Moments<W, 1>>(on, p, mean, m2, [&](W* to_mean, W* to_m2) {
      on.run(p.rows ? rows : planes, p.blocks, p.threads, p.share, items<const T>(p, m), to_mean, to_m2);
    });
  });
}

std::tuple<Tensor, Tensor> channel_stats(const Tensor& x) {
  const Map m = map_of(x, "x");
  const Tensor mean = empty_vector(m.C, stats_dtype(m.dtype), x);
  const Tensor m2 = empty_vector(m.C, stats_dtype(m.dtype), x);
  channel_stats_into(x, mean, m2);
  return {mean, m2};
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) {
  m.impl("channel_stats", TORCH_BOX(&channel_stats));
  m.impl("channel_stats_into", TORCH_BOX(&channel_stats_into));
}

}  // namespace resdense::cuda
