#pragma once
// What the launchers of convolutions share: what they ask of their maps, and the statistics of what they write.

#include <optional>
#include <tuple>

#include "common/conv_limits.h"
#include "conv.cuh"
#include "launch.h"

namespace resdense::cuda {

using Optional = std::optional<Tensor>;

inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
inline const float* floats(const Optional& t) { return t ? floats(*t) : nullptr; }
inline float* mutable_floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

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

// One number that every block of a launch adds 1 to.
inline void check_ticket(const Tensor& ticket, const Tensor& out) {
  RESDENSE_CHECK(ticket.numel() == 1, "ticket: expected one number, got shape ", shape_string(ticket));
  check_dtype(ticket, "ticket", ScalarType::Int);
  check_same_device(ticket, "ticket", out, "out");
}

// Scale, shift and rstd of the norm that reads what is written, where one does.
using Folded = std::tuple<Optional, Optional, Optional>;

namespace {  // no symbols: those of its tensors are hidden

// What becomes of the statistics of what is written, where they are wanted.
class Stats {
 public:
  Stats(const Map& out, const Optional& mean, const Optional& m2) : out_(out), mean_(mean), m2_(m2) {}

  // A norm reads what is written, and so many channels before it.
  void fold(double eps, const Optional& weight, const Optional& bias, int64_t before, const Optional& before_mean,
            const Optional& before_m2) {
    const auto vector = [&] { return empty_vector(before + out_.C, ScalarType::Float, *mean_); };
    folded_ = {vector(), vector(), vector()};
    const auto& [scale, shift, rstd] = folded_;
    reader_.count = static_cast<double>(out_.rows()), reader_.eps = eps;
    reader_.before = static_cast<int>(before), reader_.mean = floats(before_mean), reader_.m2 = floats(before_m2);
    reader_.weight = floats(weight), reader_.bias = floats(bias);
    reader_.scale = mutable_floats(*scale), reader_.shift = mutable_floats(*shift), reader_.rstd = mutable_floats(*rstd);
  }

  // With a zero that the blocks draw from the last of them is the second stage.
  void draw_from(const Tensor& ticket) { ticket_ = static_cast<unsigned*>(ticket.mutable_data_ptr()); }

  const Folded& folded() const { return folded_; }

  // Those of no positions.
  void fill() const {
    if (!mean_) return;
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    torch::stable::fill_(*mean_, nan);
    torch::stable::fill_(*m2_, 0.0);
    const auto& [scale, shift, rstd] = folded_;
    for (const Optional* of : {&scale, &shift, &rstd})
      if (*of) torch::stable::fill_(**of, nan);
  }

  // Both stages: start(stats) launches the convolution, whose blocks leave their parts there.
  template <typename F>
  void run(const Launch& on, int64_t blocks, F start) const {
    if (!mean_) return start(ConvStats{});
    const Tensor parts = torch::stable::new_empty(*mean_, {1 + 2 * out_.C, blocks});
    const ConvStats stats{mutable_floats(parts),  static_cast<int>(blocks), static_cast<int>(out_.C),
                          mutable_floats(*mean_), mutable_floats(*m2_),     reader_,
                          ticket_};
    start(stats);
    if (!ticket_) on.run(conv_stats_finish_kernel, out_.C + ceil_div(reader_.before, 32), 32, stats);
  }

 private:
  const Map& out_;
  const Optional &mean_, &m2_;
  Folded folded_;
  Reader reader_{};
  unsigned* ticket_ = nullptr;
};

}  // namespace

}  // namespace resdense::cuda
