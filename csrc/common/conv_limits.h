#pragma once
// What the CUDA kernels of convolutions take: asked by who may choose others, and checked by them.

#include "map.h"

namespace resdense {

// Channels of what is read, and of what is written.
constexpr int64_t kConv1x1Inputs = 1 << 16, kConv1x1Outputs = 192;
constexpr int64_t kConv3x3Inputs = 256, kConv3x3Outputs = 64;
// In backward the outputs are read.
constexpr int64_t kConv3x3BackwardOutputs = 32;

inline bool is_half_precision(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }

inline bool takes_channels(const Map& m, int64_t most) { return m.C > 0 && m.C % 8 == 0 && m.C <= most; }

// Channels-last, the channels of every position aligned to 16 bytes.
inline bool has_aligned_rows(const Map& m) {
  const bool vectors = (m.N == 1 || m.sn % 8 == 0) && (m.S == 1 || m.ss % 8 == 0);
  return m.channels_last && vectors && reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

// The positions of all samples, and the elements from one to the next, are counted in 32 bits.
inline bool has_few_rows(const Map& m) { return m.rows() < int64_t(1) << 30 && m.ss < int64_t(1) << 30; }

}  // namespace resdense
