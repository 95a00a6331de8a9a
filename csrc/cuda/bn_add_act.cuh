#pragma once

#include "activation.cuh"
#include "elementwise.cuh"
#include "reduce.cuh"

namespace resdense::cuda {

// out = act(scale * z + shift + identity), or with PROJECTED act(scale * z + shift + identity_scale * identity +
// identity_shift). Three times the map's bytes; stock takes seven (each batch norm reads and writes, the sum reads two and
// writes one, the activation works in place), or nine with a projection.
template <typename T, int VEC, bool PROJECTED, typename ACT>
__global__ void __launch_bounds__(kWalkThreads, kWalkBlocks)
    bn_add_act_fwd_kernel(Walk walk, Items<const T> z, Items<const T> identity, Items<T> out, const wide_t<T>* scale,
                          const wide_t<T>* shift, const wide_t<T>* identity_scale, const wide_t<T>* identity_shift,
                          ACT act) {
  start_kernel();
  using W = wide_t<T>;
  const Lane lane = lane_of<VEC>(walk);
  W a[VEC], b[VEC], c[VEC] = {};
  load_coefficients(walk, lane, scale, a);
  load_coefficients(walk, lane, shift, b);
  if constexpr (PROJECTED) {
    load_coefficients(walk, lane, identity_shift, c);
#pragma unroll
    for (int k = 0; k < VEC; ++k) b[k] += c[k];
    load_coefficients(walk, lane, identity_scale, c);
  }
  walk_rows<VEC>(walk, lane, z, identity, out, [&](int k, W value, W other) {
    return act.value(a[k] * value + b[k] + (PROJECTED ? c[k] * other : other));
  });
}

// g = grad * act', its sum and that of g * (z - center), and where the shortcut is PROJECTED that of g * (identity -
// identity_center): four or five times the map's bytes in one pass. The derivative is told by the output, or by what else `out` is,
// see `marked`. g is the gradient of either term. The sums are of g before it is rounded; `sum_g_too` gets those of g once more.
template <typename T, int VEC, bool ROWS, bool PROJECTED, typename ACT>
__global__ void __launch_bounds__(kReduceThreads, 2)
    bn_add_act_bwd_kernel(Share share, Items<const T> grad, Items<const T> out, Items<const T> z, Items<const T> identity,
                          Items<T> g, const wide_t<T>* center, const wide_t<T>* identity_center, ACT act,
                          wide_t<T>* sum_g, wide_t<T>* sum_g_zc, wide_t<T>* sum_g_too, wide_t<T>* sum_g_ic) {
  start_kernel();
  using W = wide_t<T>;
  constexpr int CHANNELS = ROWS ? VEC : 1;
  const Lane lane = lane_of<VEC, ROWS>(share);

  W c[CHANNELS], d[CHANNELS];
  load_neighbours(center + lane.channel, lane.count, c);
  if constexpr (PROJECTED) load_neighbours(identity_center + lane.channel, lane.count, d);
  Sums<W, VEC> sums, identity_sums;
  const auto step = [&]<int MAPS, int UNROLL>(Cursor at, const Vector<T, VEC>(&values)[MAPS][UNROLL]) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      W result[VEC];
#pragma unroll
      for (int k = 0; k < VEC; ++k) {
        const int channel = ROWS ? k : 0;
        const W masked = act.marked(widen(values[0][u].v[k]), widen(values[1][u].v[k]));
        sums.add(k, masked, masked * (widen(values[2][u].v[k]) - c[channel]));
        if constexpr (PROJECTED) identity_sums.add(k, masked, masked * (widen(values[3][u].v[k]) - d[channel]));
        result[k] = masked;
      }
      store_first(g.at(at, lane.channel), narrow<T>(result), lane.count);
      at.advance();
    }
  };
  // With more under way at once the sums of the projection would not fit into the registers.
  if constexpr (PROJECTED)
    walk_items<T, VEC, 1>(share, lane, {grad, out, z, identity}, step);
  else
    walk_items<T, VEC, kAtOnce<3>>(share, lane, {grad, out, z}, step);
  leave<ROWS>(share, lane, sums, sum_g, sum_g_zc);
  if constexpr (PROJECTED) {
    __syncthreads();  // the first merge is done with its slots
    leave<ROWS>(share, lane, identity_sums, sum_g_too, sum_g_ic);
  }
}

}  // namespace resdense::cuda
