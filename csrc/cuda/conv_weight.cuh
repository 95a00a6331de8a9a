#pragma once
// What the weight gradients of convolutions share: they finish a pending gradient as they read it.

#include "pending_grad.cuh"

namespace resdense::cuda {

// Finished, alpha * grad + beta * z + delta, it is also written, for the data gradient.
template <typename T>
struct PendingGrad {
  const T* z;  // nullptr where the gradient is finished already
  T* finished;
  int64_t z_sn, z_ss, finished_sn, finished_ss;  // strides of sample and position
  const float *alpha, *beta, *delta;             // 16-byte aligned

  // 16 bytes of both maps, from `channel` on.
  __device__ Vector<T, 8> finish(const Vector<T, 8>& grad, const Vector<T, 8>& of_z, int channel) const {
    float a[8], b[8], c[8], result[8];
    load_neighbours(alpha + channel, 8, a);
    load_neighbours(beta + channel, 8, b);
    load_neighbours(delta + channel, 8, c);
#pragma unroll
    for (int k = 0; k < 8; ++k) result[k] = finished_value(a[k], widen(grad.v[k]), b[k], widen(of_z.v[k]), c[k]);
    return narrow<T>(result);
  }
};

}  // namespace resdense::cuda
