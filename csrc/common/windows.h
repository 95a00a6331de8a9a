#pragma once
// The windows of a pool as an operator's arguments give them, and what is asked of these.

#include <limits>
#include <vector>

#include "check.h"

namespace resdense {

using Sizes = std::vector<int64_t>;

// Three dimensions: those that a map lacks come first and have size and window 1. Padding is at most half a window, so every
// window has an input.
struct WindowSizes {
  int in[3] = {1, 1, 1}, out[3] = {1, 1, 1};
  int kernel[3] = {1, 1, 1}, stride[3] = {1, 1, 1}, padding[3] = {0, 0, 0};
  int64_t taps = 1;  // places of a window
};

inline int narrowed(int64_t size) {
  RESDENSE_CHECK(size <= std::numeric_limits<int32_t>::max(), "x: expected spatial sizes below 2^31, got ", size);
  return static_cast<int>(size);
}

inline std::string sizes_string(const Sizes& sizes) {
  std::ostringstream text;
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "(") << sizes[i];
  text << ')';
  return text.str();
}

inline void check_spatial(const Tensor& x) {
  RESDENSE_CHECK(x.dim() >= 3 && x.dim() <= 5, "x: expected shape (N, C, ...) with 1 to 3 spatial dimensions, got ",
                 shape_string(x));
  for (int64_t i = 2; i < x.dim(); ++i)
    RESDENSE_CHECK(x.size(i) > 0, "x: expected spatial sizes of 1 or more, got ", shape_string(x));
}

inline void check_sizes(const Sizes& sizes, const char* name, int64_t count, int64_t least) {
  RESDENSE_CHECK(static_cast<int64_t>(sizes.size()) == count, name, ": expected ", count,
                 " values, one a spatial dimension of x, got ", sizes_string(sizes));
  for (const int64_t size : sizes)
    RESDENSE_CHECK(size >= least && size <= std::numeric_limits<int32_t>::max(), name, ": expected values from ", least,
                   " to 2^31 - 1, got ", sizes_string(sizes));
}

inline WindowSizes windows_of(const Tensor& x, const Sizes& kernel_size, const Sizes& stride, const Sizes& padding) {
  check_spatial(x);
  const int64_t count = x.dim() - 2;
  check_sizes(kernel_size, "kernel_size", count, 1);
  check_sizes(stride, "stride", count, 1);
  check_sizes(padding, "padding", count, 0);
  WindowSizes w;
  for (int64_t i = 0, to = 3 - count; i < count; ++i, ++to) {
    const int64_t size = x.size(i + 2), spare = size + 2 * padding[i] - kernel_size[i];
    RESDENSE_CHECK(padding[i] <= kernel_size[i] / 2, "padding: expected at most half of kernel_size ",
                   sizes_string(kernel_size), ", got ", sizes_string(padding));
    RESDENSE_CHECK(spare >= 0, "kernel_size: expected windows within the padded x of shape ", shape_string(x), ", got ",
                   sizes_string(kernel_size), " with padding ", sizes_string(padding));
    w.in[to] = narrowed(size);
    w.out[to] = narrowed(spare / stride[i] + 1);
    w.kernel[to] = static_cast<int>(kernel_size[i]);
    w.stride[to] = static_cast<int>(stride[i]);
    w.padding[to] = static_cast<int>(padding[i]);
    w.taps *= kernel_size[i];
  }
  return w;
}

// The one window that holds everything.
inline WindowSizes whole(const Tensor& x) {
  check_spatial(x);
  Sizes sizes;
  for (int64_t i = 2; i < x.dim(); ++i) sizes.push_back(x.size(i));
  return windows_of(x, sizes, Sizes(sizes.size(), 1), Sizes(sizes.size(), 0));
}

inline void check_taps(const WindowSizes& w) {
  RESDENSE_CHECK(w.taps <= 255, "kernel_size: expected at most 255 places a window, whose numbers are kept in a byte, got ",
                 w.taps);
}

// Has the shape and the device of the outputs of x.
inline void check_pooled(const Tensor& t, const char* name, const Tensor& x, const WindowSizes& w) {
  Sizes expected{x.size(0), x.size(1)};
  for (int64_t i = 2; i < x.dim(); ++i) expected.push_back(w.out[i + 3 - x.dim()]);
  bool same = t.dim() == x.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == expected[i];
  RESDENSE_CHECK(same, name, ": expected shape ", sizes_string(expected), " (that of the pooled x), got ", shape_string(t));
  check_same_device(t, name, x, "x");
}

}  // namespace resdense
