#pragma once
// The vectors of batch norm, a thread a channel: see csrc/cpu/fold.cpp. In float64, as there are few of them.

#include "device.cuh"

namespace resdense::cuda {

constexpr int kFoldThreads = 128;

template <typename W>
struct FoldOf {
  W scale, shift, rstd;
};

// Scale, shift and rstd of a norm over `count` positions, from their mean and sum of squared deviations.
template <typename W>
__device__ inline FoldOf<W> fold_of(W mean, W m2, double count, double eps, W weight, W bias) {
  const double inverse = 1 / sqrt(m2 / count + eps);
  const W scale = static_cast<W>(weight * inverse);
  return {scale, static_cast<W>(bias - mean * static_cast<double>(scale)), static_cast<W>(inverse)};
}

// Those of every channel. Without a weight or a bias it is nullptr.
template <typename W>
__global__ void __launch_bounds__(kFoldThreads)
    bn_fold_kernel(int64_t channels, const W* mean, const W* m2, double count, double eps, const W* weight, const W* bias,
                   W* scale, W* shift, W* rstd) {
  start_kernel();
  const int64_t c = int64_t(blockIdx.x) * kFoldThreads + threadIdx.x;
  if (c >= channels) return;
  const FoldOf<W> fold = fold_of(mean[c], m2[c], count, eps, weight ? weight[c] : W(1), bias ? bias[c] : W(0));
  scale[c] = fold.scale, shift[c] = fold.shift, rstd[c] = fold.rstd;
}

// Of so many norms at once, whose number and pointers are a kernel's arguments: 4 KiB in all.
constexpr int kFolds = 64;

template <typename W>
struct FoldTable {
  const W *mean[kFolds], *m2[kFolds], *weight[kFolds], *bias[kFolds];
  double count[kFolds], eps[kFolds];
  int64_t start[kFolds];  // of the norm's vectors among those of all
  int channels[kFolds];
};

// `bn_fold_kernel` of every norm of a table, of which each has `chunks` blocks. Rows of folds are `total` apart.
template <typename W>
__global__ void __launch_bounds__(kFoldThreads) bn_folds_kernel(FoldTable<W> of, int chunks, int64_t total, W* folds) {
  start_kernel();
  const int i = blockIdx.x / chunks, c = blockIdx.x % chunks * kFoldThreads + threadIdx.x;
  if (c >= of.channels[i]) return;
  W* const to = folds + of.start[i] + c;
  const FoldOf<W> fold = fold_of(of.mean[i][c], of.m2[i][c], of.count[i], of.eps[i], of.weight[i][c], of.bias[i][c]);
  to[0] = fold.scale, to[total] = fold.shift, to[2 * total] = fold.rstd;
}

// From the sums of dy and of dy * (x - mean) of a channel: dgamma, and the norm's correction of the gradient of its input,
// beta * x + delta, which is written or, to `accumulate`, added.
template <typename W>
struct Correction {
  const W *scale, *mean, *rstd;
  double count;
  W *beta, *delta, *dgamma;
  bool accumulate;

  __device__ void operator()(int64_t c, W sum_dy, W sum_dy_xc) const {
    const double shared = scale[c] / count, dg = static_cast<double>(rstd[c]) * sum_dy_xc, slope = -shared * rstd[c] * dg;
    dgamma[c] = static_cast<W>(dg);
    const W to_beta = static_cast<W>(slope), to_delta = static_cast<W>(-(shared * sum_dy + slope * mean[c]));
    beta[c] = accumulate ? beta[c] + to_beta : to_beta;
    delta[c] = accumulate ? delta[c] + to_delta : to_delta;
  }
};

template <typename W>
__global__ void __launch_bounds__(kFoldThreads)
    bn_correction_kernel(int64_t channels, const W* sum_dy, const W* sum_dy_xc, Correction<W> correct) {
  start_kernel();
  const int64_t c = int64_t(blockIdx.x) * kFoldThreads + threadIdx.x;
  if (c < channels) correct(c, sum_dy[c], sum_dy_xc[c]);
}

}  // namespace resdense::cuda
