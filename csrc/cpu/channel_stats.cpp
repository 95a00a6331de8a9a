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

}  // namespace resdense::cpu

STABLE_TORCH_LIBRARY_IMPL(resdense, CPU, m) { m.impl("channel_stats", TORCH_BOX(&resdense::cpu::channel_stats)); }
