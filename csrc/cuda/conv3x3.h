#pragma once
// What the launchers of 3x3 convolutions share.

#include "conv.h"
#include "stack.h"

namespace resdense::cuda {

inline void check_conv3x3_maps(const Tensor& x, const Map& from, const Tensor& t, const char* name, const Map& m,
                               int64_t outputs) {
  RESDENSE_CHECK(x.dim() == 4, "x: expected shape (N, C, H, W), got ", shape_string(x));
  check_maps(x, from, kConv3x3Inputs, t, name, m, outputs);
}

inline void check_conv3x3_weight(const Tensor& weight, int64_t outputs, const Tensor& x, const Map& from) {
  const bool right = weight.dim() == 4 && weight.size(0) == outputs && weight.size(1) == from.C && weight.size(2) == 3 &&
                     weight.size(3) == 3;
  RESDENSE_CHECK(right, "weight: expected shape (", outputs, ", ", from.C, ", 3, 3), got ", shape_string(weight));
  check_dtype(weight, "weight", from.dtype);
  check_same_device(weight, "weight", x, "x");
}

// [outputs][3][3][channels], at an aligned address: as the weights of a channels-last network lie.
inline Tensor rows_of_taps(const Tensor& weight) {
  return at_aligned_address(torch::stable::contiguous(weight, torch::headeronly::MemoryFormat::ChannelsLast));
}

}  // namespace resdense::cuda
