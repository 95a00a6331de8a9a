#pragma once
// Activations, as arguments of kernels. Each has
//   value(y)           act(y)
//   gradient(g, y)     g act'(y)
//   marked(g, m)       the same, where m is act(y), or where that does not determine the derivative, y
//   before_maximum(y)  a value whose maxima are those of act(y), up to what is_relu() says is to be done with them
// A NaN stays one, and behind an activation that stops it even an infinite gradient is 0.

#include <cmath>

#include "common/activation.h"
#include "device.cuh"

namespace resdense::cuda {

// y > 0 ? y : slope * y
template <typename W>
struct Slope {
  static constexpr bool kCurve = false;
  W slope;

  __device__ W value(W y) const { return activate(y, slope); }
  __device__ W gradient(W g, W y) const { return activate_backward(g, y, slope); }
  // For a slope of 0 or more the two lie on the same side of 0.
  __device__ W marked(W g, W m) const { return activate_backward(g, m, slope); }

  // A ReLU comes after the maximum, once: before it, every tap would pay for it.
  __device__ bool is_relu() const { return slope == W(0); }
  __device__ W before_maximum(W y) const { return is_relu() ? y : value(y); }
};

// Those that are no slope. All threads take the same branch.
template <typename W>
struct Curve {
  static constexpr bool kCurve = true;
  enum { relu6, elu, silu } kind;

  explicit Curve(double activation) : kind(activation == kSilu ? silu : activation == kElu ? elu : relu6) {}

  __device__ W value(W y) const {
    if (kind == silu) return y / (1 + std::exp(-y));
    if (kind == elu) return y <= W(0) ? std::expm1(y) : y;
    return y <= W(0) ? W(0) : y >= W(6) ? W(6) : y;
  }

  __device__ W gradient(W g, W y) const {
    if (kind == relu6) return y <= W(0) || y >= W(6) ? W(0) : g;
    const W power = std::exp(kind == elu ? y : -y);
    if (kind == elu) return y <= W(0) ? g * power : g;
    const W gate = 1 / (1 + power);
    return g * (gate * (1 + y * (1 - gate)));
  }

  __device__ W marked(W g, W m) const {
    if (kind == elu) return m <= W(0) ? g * (m + 1) : g;
    return gradient(g, m);
  }

  __device__ static constexpr bool is_relu() { return false; }
  __device__ W before_maximum(W y) const { return value(y); }
};

}  // namespace resdense::cuda
