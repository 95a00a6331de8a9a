#pragma once
// What the launchers of convolutions share: what they ask of their maps, and the statistics of what they write.

#include <optional>

#include "common/conv_limits.h"
#include "conv.cuh"
#include "launch.h"

namespace resdense::cuda {

using Optional = std::optional<Tensor>;

inline void check_channels(const Map& m, const char* name, int64_t most) {
  RESDENSE_CHECK(takes_channels(m, most), name, ": expected a multiple of 8 channels, at most ", most,
                 ", got ", m.C);
}

inline void check_rows(const Map& m, const Tensor& t, const char* name) {
  RESDENSE_CHECK(has_aligned_rows(m), name,
                 ": expected channels_last, the channels of every position aligned to 16 bytes, got strides ",
                 stride_string(t), aligned(m.data) ? "" : " at an address that is not aligned");
}

inline void check_few_rows(const Map& m, const char* name) {
  RESDENSE_CHECK(has_few_rows(m), name,
                 ": expected less than 2^30 positions, and elements from one to the next, got ", m.rows(), " and ", m.ss);
}

// The positions of all samples as the rows of one matrix.
inline void check_matrix(const Map& m, const Tensor& t, const char* name) {
  check_rows(m, t, name);
  RESDENSE_CHECK(m.uniform_rows(), name, ": expected one stride from position to position across samples, got shape ",
                 shape_string(t), " with strides ", stride_string(t));
  check_few_rows(m, name);
}

// A map of the positions of x, with channels of its own.
inline void check_positions(const Tensor& t, const char* name, const Tensor& x) {
  bool same = t.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = i == 1 || t.size(i) == x.size(i);
  RESDENSE_CHECK(same, name, ": expected the samples and positions of x, whose shape is ", shape_string(x), ", got shape ",
                 shape_string(t));
}

inline void check_half_precision(const Map& m, const char* name) {
  RESDENSE_CHECK(is_half_precision(m.dtype), name,
                 ": expected dtype bfloat16 or float16, got ", dtype_name(m.dtype));
}

// The convolution's input and a map of its outputs, or of their gradient: dtypes, positions and channels, at most so many.
inline void check_maps(const Tensor& x, const Map& from, int64_t inputs, const Tensor& t, const char* name, const Map& m,
                       int64_t outputs) {
  check_half_precision(from, "x");
  check_channels(from, "x", inputs);
  check_dtype(t, name, from.dtype);
  check_same_device(t, name, x, "x");
  check_positions(t, name, x);
  check_channels(m, name, outputs);
}

// Calls f with a value of the map's dtype, one of those two.
template <typename F>
inline void dispatch_half_precision(const Map& m, F f) {
  if (m.dtype == ScalarType::Half)
    f(__half{});
  else
    f(__nv_bfloat16{});
}

// The products know no other activations.
inline float slope_of(double activation) {
  RESDENSE_CHECK(is_slope(activation), "activation: expected the slope of what is negative, got ", activation);
  return static_cast<float>(activation);
}

inline Tensor at_aligned_address(const Tensor& t) { return aligned(t.const_data_ptr()) ? t : torch::stable::clone(t); }

// The statistics of no positions, where they are wanted.
inline void fill_stats(const Optional& mean, const Optional& m2) {
  if (!mean) return;
  torch::stable::fill_(*mean, std::numeric_limits<double>::quiet_NaN());
  torch::stable::fill_(*m2, 0.0);
}

// Both stages of the statistics, where they are wanted: start(parts) launches the convolution, whose blocks leave count, means
// and m2 there. The second one folds the norm that reads what is written, too.
template <typename F>
inline void run_with_stats(const Launch& on, int64_t blocks, int64_t channels, const Optional& mean, const Optional& m2,
                           const Reader& reader, F start) {
  if (!mean) return start(static_cast<float*>(nullptr));
  const Tensor memory = torch::stable::new_empty(*mean, {1 + 2 * channels, blocks});
  float* const parts = static_cast<float*>(memory.mutable_data_ptr());
  start(parts);
  on.run(conv_stats_finish_kernel, channels, 32, parts, blocks, channels,
         static_cast<float*>(mean->mutable_data_ptr()), static_cast<float*>(m2->mutable_data_ptr()), reader);
}

}  // namespace resdense::cuda
