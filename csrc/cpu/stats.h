#pragma once
// Count, mean and sum of squared deviations of every channel, tile by tile: two passes over a tile while it is in the
// cache, merged by Chan's formula, so that a mean a thousand times the deviation costs no digits.

#include <cmath>
#include <optional>
#include <tuple>

#include "tile.h"

namespace resdense::cpu {

class Stats {
 public:
  Stats(int64_t chunks, const Map& m)
      : channels_(m.C), dtype_(m.dtype), counts_(chunks), values_(chunks * 2 * m.C), tile_(chunks * 3 * m.C),
        center_(chunks * m.C * (m.dtype == ScalarType::Double ? 2 : 1)) {}

  void add(int64_t chunk, const std::vector<Segment>& segments, int64_t positions, bool channels_last, const Operand& x) {
    double* sum = tile_.data() + chunk * 3 * channels_;
    double* deviation = sum + channels_;
    double* squares = deviation + channels_;
    std::fill_n(sum, 3 * channels_, 0.0);
    float* center = center_.data() + chunk * channels_ * (dtype_ == ScalarType::Double ? 2 : 1);
    Sweep s{Pass::sum, dtype_, channels_last, segments.data(), static_cast<int64_t>(segments.size()), channels_};
    s.in[0] = x;
    s.sums[0] = sum;
    kernels.sweep(s);
    for (int64_t c = 0; c < channels_; ++c) {
      sum[c] /= positions;
      if (dtype_ == ScalarType::Double) reinterpret_cast<double*>(center)[c] = sum[c];
      else sum[c] = center[c] = static_cast<float>(sum[c]);
    }
    s.pass = Pass::deviation;
    s.coef[0] = center;
    s.sums[0] = deviation, s.sums[1] = squares;
    kernels.sweep(s);
    double* mean = values_.data() + chunk * 2 * channels_;
    for (int64_t c = 0; c < channels_; ++c) {
      // The center is the mean rounded; what rounding left over is taken out here.
      const double rest = deviation[c] / positions;
      sum[c] += rest;
      squares[c] -= deviation[c] * rest;
    }
    merge(counts_[chunk], mean, mean + channels_, positions, sum, squares);
  }

  void total(const Map& like, Tensor mean, Tensor m2) {
    const auto [found, squares] = total(like);
    torch::stable::copy_(mean, found);
    torch::stable::copy_(m2, squares);
  }

  std::tuple<Tensor, Tensor> total(const Map& like) {
    const int64_t chunks = static_cast<int64_t>(counts_.size());
    double* mean = values_.data();
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const double* other = mean + chunk * 2 * channels_;
      merge(counts_[0], mean, mean + channels_, counts_[chunk], other, other + channels_);
    }
    if (chunks == 0) values_.assign(2 * channels_, std::nan(""));
    return {vector_from(values_.data(), channels_, like), vector_from(values_.data() + channels_, channels_, like)};
  }

 private:
  void merge(int64_t& count, double* mean, double* m2, int64_t n, const double* mean_n, const double* m2_n) const {
    const double weight = static_cast<double>(n) / (count + n), cross = weight * count;
    for (int64_t c = 0; c < channels_; ++c) {
      const double d = mean_n[c] - mean[c];
      mean[c] += d * weight;
      m2[c] += m2_n[c] + d * d * cross;
    }
    count += n;
  }

  int64_t channels_;
  ScalarType dtype_;
  std::vector<int64_t> counts_;
  std::vector<double> values_;  // a chunk's mean and m2
  std::vector<double> tile_;    // a tile's, on the way
  std::vector<float> center_;   // a tile's rounded mean in the dtype of the coefficients
};

// Scale, shift and rstd of a norm over `count` positions with these statistics: see fold.cpp.
std::tuple<Tensor, Tensor, Tensor> bn_fold(const Tensor& mean, const Tensor& m2, double count, double eps,
                                           const std::optional<Tensor>& weight, const std::optional<Tensor>& bias);

}  // namespace resdense::cpu
