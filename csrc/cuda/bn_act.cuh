#pragma once

#include "activation.cuh"
#include "elementwise.cuh"
#include "reduce.cuh"

namespace resdense::cuda {

// out = act(scale * x + shift). Twice the map's bytes: at 4.3 TB/s a bf16 map of 64 x 56 x 56 x 32 samples takes 6 us.
template <typename T, int VEC, typename ACT>
__global__ void __launch_bounds__(kWalkThreads, kWalkBlocks)
    bn_act_fwd_kernel(Walk walk, Items<const T> x, Items<T> out, const wide_t<T>* scale, const wide_t<T>* shift, ACT act) {
  start_kernel();
  using W = wide_t<T>;
  const Lane lane = lane_of<VEC>(walk);
  W a[VEC], b[VEC];
  load_coefficients(walk, lane, scale, a);
  load_coefficients(walk, lane, shift, b);
  walk_rows<VEC>(walk, lane, x, out, [&](int k, W value) { return act.value(a[k] * value + b[k]); });
}

// One value of a backward of act(a * x + b): adds dy = g * act'(a * x + b) and dy * (x - c) to the sums of the k-th channel, and
// returns what is to be written, dy or, to ACCUMULATE, before + a * dy.
template <bool ACCUMULATE, typename W, int K, typename ACT>
__device__ inline W mask_value(W g, W value, W before, W a, W b, W c, ACT act, int k, Sums<W, K>& sums) {
  const W dy = act.gradient(g, a * value + b);
  sums.add(k, dy, dy * (value - c));
  return ACCUMULATE ? before + a * dy : dy;
}

// What every backward of act(scale * x + shift) does in one pass: dy = gradient * act'(scale * x + shift), its sum and that of
// dy * (x - center), and to WRITE, out = dy or, to ACCUMULATE, out += scale * dy. `maps` are x, out where it is accumulated into,
// and what gradient(at, values, u, g) takes g from, the gradients of the u-th vector; `at` is its place. The sums are of dy before
// it is rounded.
template <int VEC, bool ROWS, bool WRITE, bool ACCUMULATE, int AT_ONCE, typename T, int MAPS, typename ACT, typename F>
__device__ inline void mask_and_sum(const Share& share, const Lane& lane, const Items<const T> (&maps)[MAPS],
                                    const Items<T>& out, const wide_t<T>* scale, const wide_t<T>* shift,
                                    const wide_t<T>* center, ACT act, wide_t<T>* sum_dy,
                                    wide_t<T>* sum_dy_xc, F gradient) {
  using W = wide_t<T>;
  constexpr int CHANNELS = ROWS ? VEC : 1;

  W a[CHANNELS], b[CHANNELS], c[CHANNELS];
  load_neighbours(scale + lane.channel, lane.count, a);
  load_neighbours(shift + lane.channel, lane.count, b);
  load_neighbours(center + lane.channel, lane.count, c);
  Sums<W, VEC> sums;
  walk_items<T, VEC, AT_ONCE>(share, lane, maps, [&]<int UNROLL>(Cursor at, const Vector<T, VEC>(&values)[MAPS][UNROLL]) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      W g[VEC];
      gradient(at, values, u, g);
      W result[VEC];
#pragma unroll
      for (int k = 0; k < VEC; ++k) {
        const int channel = ROWS ? k : 0;
        result[k] = mask_value<ACCUMULATE>(g[k], widen(values[0][u].v[k]), widen(values[ACCUMULATE][u].v[k]), a[channel],
                                           b[channel], c[channel], act, k, sums);
      }
      if constexpr (WRITE) store_first(out.at(at, lane.channel), narrow<T>(result), lane.count);
      at.advance();
    }
  });
  leave<ROWS>(share, lane, sums, sum_dy, sum_dy_xc);
}

// `mask_and_sum` of a gradient that is a map: two, three or four times the map's bytes in one pass, where the mask, the sums and
// the addition one by one take ten. A thread writes only what it has read itself, so out may be grad.
template <typename T, int VEC, bool ROWS, bool WRITE, bool ACCUMULATE, typename ACT>
__global__ void __launch_bounds__(kReduceThreads, 2)
    bn_act_bwd_kernel(Share share, Items<const T> grad, Items<const T> x, Items<T> out, const wide_t<T>* scale,
                      const wide_t<T>* shift, const wide_t<T>* center, ACT act, wide_t<T>* sum_dy, wide_t<T>* sum_dy_xc) {
  start_kernel();
  const auto run = [&]<int MAPS>(const Items<const T>(&maps)[MAPS]) {
    // Curves take registers of their own.
    constexpr int AT_ONCE = ACT::kCurve ? 2 : kAtOnce<MAPS>;
    const auto loaded = [](const Cursor&, const auto& values, int u, wide_t<T>(&g)[VEC]) {
#pragma unroll
      for (int k = 0; k < VEC; ++k) g[k] = widen(values[MAPS - 1][u].v[k]);
    };
    mask_and_sum<VEC, ROWS, WRITE, ACCUMULATE, AT_ONCE>(share, lane_of<VEC, ROWS>(share), maps, out, scale, shift, center, act,
                                                        sum_dy, sum_dy_xc, loaded);
  };
  if constexpr (ACCUMULATE)
    run({x, {out.data, out.sn, out.si, out.sc}, grad});
  else
    run({x, grad});
}

}  // namespace resdense::cuda
