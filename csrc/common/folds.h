#pragma once
// Where the vectors of many norms lie beside each other, and what is asked of their arguments.

#include <vector>

#include "check.h"

namespace resdense {

struct FoldSizes {
  std::vector<int64_t> start;  // aligned to 16 bytes in float32
  int64_t total = 0, most = 0;  // columns in all, and channels of one norm at most
};

inline FoldSizes fold_sizes(const std::vector<Tensor>& mean, const std::vector<Tensor>& m2, const std::vector<double>& count,
                            const std::vector<double>& eps, const std::vector<Tensor>& weight, const std::vector<Tensor>& bias) {
  const size_t norms = mean.size();
  const auto check_number = [&](size_t size, const char* name) {
    RESDENSE_CHECK(size == norms, name, ": expected ", norms, " values, as many as mean has, got ", size);
  };
  check_number(m2.size(), "m2"), check_number(count.size(), "count"), check_number(eps.size(), "eps");
  check_number(weight.size(), "weight"), check_number(bias.size(), "bias");
  FoldSizes sizes;
  for (size_t i = 0; i < norms; ++i) {
    const int64_t C = mean[i].size(0);
    check_vector(mean[i], "mean", C, mean[0], "mean");
    check_vector(m2[i], "m2", C, mean[0], "mean");
    check_vector(weight[i], "weight", C, mean[0], "mean");
    check_vector(bias[i], "bias", C, mean[0], "mean");
    sizes.start.push_back(sizes.total);
    sizes.total += (C + 3) / 4 * 4;
    sizes.most = std::max(sizes.most, C);
  }
  return sizes;
}

}  // namespace resdense
