#pragma once
// Pooling of act(scale * x + shift), which is never stored. The walk is that of a reduction (reduce.cuh), forward over the
// outputs, backward over the inputs, so that no two threads write one place. Vectors lie along channels only: along positions
// every value of one would have windows of its own.

#include <cmath>

#include "bn_act.cuh"
#include "windows.cuh"

namespace resdense::cuda {

// Vectors are whole, or lie past the last channel. That no case is left for one that is cut off spares registers.
template <int VEC>
__device__ inline Lane whole_lane_of(const Share& share) {
  Lane lane = lane_of<VEC, true>(share);
  lane.count = lane.count < VEC ? 0 : VEC;
  return lane;
}

// A window's sum as it grows; `taps` is a whole window's, as padding counts.
template <typename W, int VEC>
struct Average {
  int64_t taps;
  W sum[VEC] = {};

  __device__ void add(int k, W y, int) { sum[k] += y; }
  __device__ W result(int k) const { return sum[k] / W(taps); }
};

// A window's maximum and its tap as torch chooses it: the first of equals, the last NaN; of the values as they would have been
// written.
template <typename T, int VEC>
struct Maximum {
  using W = wide_t<T>;
  W largest[VEC];
  uint8_t tap[VEC];

  __device__ explicit Maximum(int first_tap) {
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
      largest[k] = -static_cast<W>(INFINITY);
      tap[k] = static_cast<uint8_t>(first_tap);
    }
  }

  __device__ void add(int k, W y, int at) {
    T rounded;
    narrow(y, rounded);
    y = widen(rounded);
    if (y > largest[k] || y != y) {
      largest[k] = y;
      tap[k] = static_cast<uint8_t>(at);
    }
  }
  __device__ W result(int k) const { return largest[k]; }
};

// out = pool(act(scale * x + shift)), and the places of the maxima. Reads the map once (windows that overlap meet in the
// caches) and writes the outputs: 1.25 times the map's bytes for windows of 2 x 2, where the batch norm and the activation
// alone take four.
template <typename T, int VEC, bool MAXIMUM>
__global__ void __launch_bounds__(kReduceThreads, 2)
    bn_act_pool_fwd_kernel(Share share, Windows windows, Items<const T> x, const wide_t<T>* scale, const wide_t<T>* shift,
                           wide_t<T> slope, Items<T> out, Items<uint8_t> taps) {
  using W = wide_t<T>;
  const Lane lane = whole_lane_of<VEC>(share);

  W a[VEC] = {}, b[VEC] = {};
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    if (k < lane.count) {
      a[k] = scale[lane.channel + k];
      b[k] = shift[lane.channel + k];
    }
  }
  Cursor at(lane.first, lane.step, share.sample_items);
  for (int64_t item = lane.first; item < lane.end; item += lane.step, at.advance()) {
    const Box box = windows.inputs_of(at.s);
    auto pool = [&] {
      if constexpr (MAXIMUM)
        return Maximum<T, VEC>(box.first_tap());
      else
        return Average<W, VEC>{windows.taps};
    }();
    box.each<2>([&](int64_t position, int tap) {
      const auto values = load<T, VEC>(x.at(at.n, position, lane.channel));
#pragma unroll
      for (int k = 0; k < VEC; ++k) pool.add(k, activate(a[k] * widen(values.v[k]) + b[k], slope), tap);
    });
    Vector<T, VEC> result;
#pragma unroll
    for (int k = 0; k < VEC; ++k) narrow(pool.result(k), result.v[k]);
    store(out.at(at, lane.channel), result);
    if constexpr (MAXIMUM) {
      Vector<uint8_t, VEC> chosen;
#pragma unroll
      for (int k = 0; k < VEC; ++k) chosen.v[k] = pool.tap[k];
      store(taps.at(at, lane.channel), chosen);
    }
  }
}

// `mask_and_sum` of the gradient that a pool passes back to an input: from every window that covers it its share, or, of
// MAXIMUM, all of it where the input was the largest. Two or three times the map's bytes and the outputs'. One item at a time:
// the loops over windows are what fills the registers.
template <typename T, int VEC, bool MAXIMUM, bool ACCUMULATE>
__global__ void __launch_bounds__(kReduceThreads, 2)
    bn_act_pool_bwd_kernel(Share share, Windows windows, Items<const T> grad, Items<const uint8_t> taps,
                           Items<const T> x, Items<T> out, const wide_t<T>* scale, const wide_t<T>* shift,
                           const wide_t<T>* center, wide_t<T> slope, wide_t<T>* sum_dy, wide_t<T>* sum_dy_xc) {
  using W = wide_t<T>;
  const Lane lane = whole_lane_of<VEC>(share);
  const auto gather = [&](const Cursor& at, const auto&, int, W(&g)[VEC]) {
#pragma unroll
    for (int k = 0; k < VEC; ++k) g[k] = 0;
    windows.outputs_of(at.s).each<1>([&](int64_t position, int tap) {
      const auto values = load<T, VEC>(grad.at(at.n, position, lane.channel));
      if constexpr (MAXIMUM) {
        const auto chosen = load<uint8_t, VEC>(taps.at(at.n, position, lane.channel));
#pragma unroll
        for (int k = 0; k < VEC; ++k)
          if (chosen.v[k] == tap) g[k] += widen(values.v[k]);
      } else {
#pragma unroll
        for (int k = 0; k < VEC; ++k) g[k] += widen(values.v[k]);
      }
    });
    if constexpr (!MAXIMUM) {
#pragma unroll
      for (int k = 0; k < VEC; ++k) g[k] /= W(windows.taps);
    }
  };
  const auto run = [&]<int MAPS>(const Items<const T>(&maps)[MAPS]) {
    mask_and_sum<VEC, true, ACCUMULATE, 1>(share, lane, maps, out, scale, shift, center, slope, sum_dy, sum_dy_xc, gather);
  };
  if constexpr (ACCUMULATE)
    run({x, {out.data, out.sn, out.si, out.sc}});
  else
    run({x});
}

// One sum of each of K channels.
template <typename W, int K>
struct Sum {
  using Value = W;
  W v[K] = {};

  __device__ void merge(const Sum& other) {
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] += other.v[k];
  }
};

// The mean of act(scale * x + shift) over all positions of a sample, [N, C]. A chunk is a sample. The map's bytes once.
template <typename T, int VEC>
__global__ void __launch_bounds__(kReduceThreads, 2)
    bn_act_global_pool_fwd_kernel(Share share, Items<const T> x, const wide_t<T>* scale, const wide_t<T>* shift,
                                  wide_t<T> slope, T* out) {
  using W = wide_t<T>;
  const Lane lane = whole_lane_of<VEC>(share);

  W a[VEC] = {}, b[VEC] = {};
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    if (k < lane.count) {
      a[k] = scale[lane.channel + k];
      b[k] = shift[lane.channel + k];
    }
  }
  Sum<W, VEC> sum;
  // As many at once as of two maps: the coefficients take registers, too.
  walk_items<T, VEC, kAtOnce<2>>(share, lane, {x}, [&]<int UNROLL>(const Cursor&, const Vector<T, VEC>(&values)[1][UNROLL]) {
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
      W group = 0;
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) group += activate(a[k] * widen(values[0][u].v[k]) + b[k], slope);
      sum.v[k] += group;
    }
  });
  merge_block(sum, share.tx);
  if (int(threadIdx.x) >= share.tx) return;
  Vector<T, VEC> result;
#pragma unroll
  for (int k = 0; k < VEC; ++k) narrow(sum.v[k] / W(share.chunk_items), result.v[k]);
#pragma unroll
  for (int k = 0; k < VEC; ++k)
    if (k < lane.count) out[lane.chunk * share.channels + lane.channel + k] = result.v[k];
}

}  // namespace resdense::cuda
