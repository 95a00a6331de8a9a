#pragma once
// The vectors of batch norm, a thread a channel: see csrc/cpu/fold.cpp. In float64, as there are few of them.

#include "device.cuh"

namespace resdense::cuda {

constexpr int kFoldThreads = 128;

// Scale, shift and rstd of a norm over `count` positions, from their mean and sum of squared deviations. Without a weight or a
// bias it is nullptr.
template <typename W>
__global__ void __launch_bounds__(kFoldThreads)
    bn_fold_kernel(int64_t channels, const W* mean, const W* m2, double count, double eps, const W* weight, const W* bias,
                   W* scale, W* shift, W* rstd) {
  const int64_t c = int64_t(blockIdx.x) * kFoldThreads + threadIdx.x;
  if (c >= channels) return;
  const double inverse = 1 / sqrt(m2[c] / count + eps);
  const W s = static_cast<W>(weight ? weight[c] * inverse : inverse);
  scale[c] = s;
  shift[c] = static_cast<W>((bias ? bias[c] : W(0)) - mean[c] * static_cast<double>(s));
  rstd[c] = static_cast<W>(inverse);
}

// From the sums of dy and of dy * (x - mean): dgamma, and the norm's correction of the gradient of its input, beta * x + delta,
// which is written or, to ACCUMULATE, added.
template <typename W, bool ACCUMULATE>
__global__ void __launch_bounds__(kFoldThreads)
    bn_correction_kernel(int64_t channels, const W* sum_dy, const W* sum_dy_xc, const W* scale, const W* mean, const W* rstd,
                         double count, W* beta, W* delta, W* dgamma) {
  const int64_t c = int64_t(blockIdx.x) * kFoldThreads + threadIdx.x;
  if (c >= channels) return;
  const double shared = scale[c] / count, dg = static_cast<double>(rstd[c]) * sum_dy_xc[c], slope = -shared * rstd[c] * dg;
  dgamma[c] = static_cast<W>(dg);
  const W to_beta = static_cast<W>(slope), to_delta = static_cast<W>(-(shared * sum_dy[c] + slope * mean[c]));
  beta[c] = ACCUMULATE ? beta[c] + to_beta : to_beta;
  delta[c] = ACCUMULATE ? delta[c] + to_delta : to_delta;
}

}  // namespace resdense::cuda
