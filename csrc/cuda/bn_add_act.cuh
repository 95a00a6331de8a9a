#pragma once

#include "elementwise.cuh"

namespace resdense::cuda {

// out = act(scale * z + shift + identity), or with PROJECTED act(scale * z + shift + identity_scale * identity +
// identity_shift). Three times the map's bytes; stock takes seven (each batch norm reads and writes, the sum reads two and
// writes one, the activation works in place), or nine with a projection.
template <typename T, int VEC, bool PROJECTED>
__global__ void bn_add_act_fwd_kernel(Walk walk, int64_t positions, Operand<const T> z, Operand<const T> identity,
                                      Operand<T> out, const wide_t<T>* scale, const wide_t<T>* shift,
                                      const wide_t<T>* identity_scale, const wide_t<T>* identity_shift,
                                      wide_t<T> slope) {
  using W = wide_t<T>;
  const Place place = place_of<VEC>(walk);
  if (place.count <= 0) return;

  W a[VEC], b[VEC], c[VEC];
  each_channel<VEC>(place, positions, [&](int k, int64_t channel) {
    a[k] = scale[channel];
    b[k] = shift[channel];
    if (PROJECTED) {
      c[k] = identity_scale[channel];
      b[k] += identity_shift[channel];
    }
  });
  walk_rows<T, VEC>(walk, place, z, identity, out, [&](int k, W value, W other) {
    return activate(a[k] * value + b[k] + (PROJECTED ? c[k] * other : other), slope);
  });
}

}  // namespace resdense::cuda
