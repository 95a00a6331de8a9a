#include <torch/csrc/stable/library.h>

#include "stats.h"

namespace resdense::cpu {

std::tuple<Tensor, Tensor> channel_stats(const Tensor& x) {
  const Map m = map_of(x, "x");
  const Tiling tiling(m, m.C * element_size(m.dtype));
  Stats stats(tiling.chunks, m);
  tiling.each([&](int64_t chunk, int64_t, int64_t positions, const std::vector<Segment>& segments) {
    stats.add(chunk, segments, positions, m.channels_last, operand(m));
  });
  return stats.total(m);
}

void channel_stats_into(const Tensor& x, const Tensor& mean, const Tensor& m2) {
  check_vector(mean, "mean", map_of(x, "x").C, x, "x");
  check_vector(m2, "m2", map_of(x, "x").C, x, "x");
  const auto [found, squares] = channel_stats(x);
  Tensor to = mean, to_squares = m2;
  torch::stable::copy_(to, found);
  torch::stable::copy_(to_squares, squares);
}

}  // namespace resdense::cpu

STABLE_TORCH_LIBRARY_IMPL(resdense, CPU, m) {
  m.impl("channel_stats", TORCH_BOX(&resdense::cpu::channel_stats));
  m.impl("channel_stats_into", TORCH_BOX(&resdense::cpu::channel_stats_into));
}
