#pragma once

#include "elementwise.cuh"

namespace resdense::cuda {

// dy = alpha * dy + beta * z + delta, in place: the last step of a deferred batch-norm backward. Three times the map's
// bytes: at 4.3 TB/s a bf16 map of 32 x 56 x 56 x 32 samples takes 4.5 us. A thread writes only what it has read itself.
template <typename T, int VEC>
__global__ void pending_grad_kernel(Walk walk, int64_t positions, Operand<const T> dy, Operand<const T> z, Operand<T> out,
                                    const wide_t<T>* alpha, const wide_t<T>* beta, const wide_t<T>* delta) {
  using W = wide_t<T>;
  const Place place = place_of<VEC>(walk);
  if (place.count <= 0) return;

  W a[VEC], b[VEC], c[VEC];
  each_channel<VEC>(place, positions, [&](int k, int64_t channel) {
    a[k] = alpha[channel];
    b[k] = beta[channel];
    c[k] = delta[channel];
  });
  walk_rows<T, VEC>(walk, place, dy, z, out, [&](int k, W g, W value) { return a[k] * g + (b[k] * value + c[k]); });
}

}  // namespace resdense::cuda
