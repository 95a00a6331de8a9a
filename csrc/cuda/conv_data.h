#pragma once
// What the launchers of convolutions' data gradients share.

#include <tuple>

#include "conv.h"
#include "conv_data.cuh"
#include "reduce.h"

namespace resdense::cuda {

// How tiles of positions are shared out: a block has every slices-th, of which so many `warps` add up the same channels, and
// leave their sums every `chain` tiles and at the end.
struct DataShare {
  int64_t tiles, slices, chain, warps;
};

// Both stages of the sums: start(sum_dy, sum_dy_xc) launches the convolution, whose warps leave theirs there.
template <typename F>
inline void reduce_data_sums(const Launch& on, const DataShare& share, int64_t channels,
                             const std::tuple<Tensor, Tensor>& sums, F start) {
  const int64_t round = share.slices * share.chain;
  const int64_t left = std::min(share.tiles % round, share.slices);
  ReducePlan parts{};
  parts.share.channels = channels;
  parts.share.chunk_items = parts.item_positions = 1;
  parts.share.items = parts.chunks = (share.tiles / round * share.slices + left) * share.warps;
  reduce<Sums<float, 1>>(on, parts, std::get<0>(sums), std::get<1>(sums), start);
}

}  // namespace resdense::cuda
