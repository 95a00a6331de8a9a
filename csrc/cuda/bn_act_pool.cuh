#pragma once
// Pooling of act(scale * x + shift), which is never stored. The walk is that of a reduction (reduce.cuh), forward over the
// outputs, backward over the inputs, so that no two threads write one place. Vectors lie along channels only: along positions
// every value of one would have windows of its own.

#include <cmath>
#include <cstring>

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
template <typename T, int VEC>
struct Average {
  using W = wide_t<T>;
  int64_t taps;
  W sum[VEC] = {};

  template <typename ACT>
  __device__ void add(const Vector<T, VEC>& x, const W (&a)[VEC], const W (&b)[VEC], ACT act, int) {
#pragma unroll
    for (int k = 0; k < VEC; ++k) sum[k] += act.value(a[k] * widen(x.v[k]) + b[k]);
  }

  __device__ Vector<T, VEC> result() const {
    Vector<T, VEC> result;
#pragma unroll
    for (int k = 0; k < VEC; ++k) narrow(sum[k] / W(taps), result.v[k]);
    return result;
  }
};

// A window's maximum and its tap as torch chooses it: the first of equals, the last NaN; of the values as they would have been
// written.
template <typename T, int VEC>
struct Maximum {
  using W = wide_t<T>;
  T largest[VEC];
  uint8_t tap[VEC];

  __device__ explicit Maximum(int first_tap) {
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
      narrow(-static_cast<W>(INFINITY), largest[k]);
      tap[k] = static_cast<uint8_t>(first_tap);
    }
  }

  template <typename ACT>
  __device__ void add(const Vector<T, VEC>& x, const W (&a)[VEC], const W (&b)[VEC], ACT act, int at) {
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
      T rounded;
      narrow(act.before_maximum(a[k] * widen(x.v[k]) + b[k]), rounded);
      const W y = widen(rounded);
      if (y > widen(largest[k]) || y != y) {
        largest[k] = rounded;
        tap[k] = static_cast<uint8_t>(at);
      }
    }
  }

  // What a ReLU makes equal are all values but those above 0: their maximum is the first.
  __device__ void relu(int first_tap) {
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
      if (widen(largest[k]) <= W(0)) {
        largest[k] = T{};
        tap[k] = static_cast<uint8_t>(first_tap);
      }
    }
  }

  __device__ Vector<T, VEC> result() const {
    Vector<T, VEC> result;
#pragma unroll
    for (int k = 0; k < VEC; ++k) result.v[k] = largest[k];
    return result;
  }

  __device__ Vector<uint8_t, VEC> taps() const {
    Vector<uint8_t, VEC> result;
#pragma unroll
    for (int k = 0; k < VEC; ++k) result.v[k] = tap[k];
    return result;
  }
};

// std::bit_cast for CUDA's own types, which are not trivial.
template <typename To, typename From>
__device__ inline To bit_copy(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(static_cast<void*>(&to), static_cast<const void*>(&from), sizeof(To));
  return to;
}

// The same of 16-bit values, two at a time as they lie in registers: half the instructions, of which windows that overlap take
// more than the memory has time for.
template <typename T, int VEC>
  requires(sizeof(T) == 2 && VEC % 2 == 0)
struct Maximum<T, VEC> {
  using Pair = decltype(narrow_pair(0, 0, T{}));
  uint32_t largest[VEC / 2], tap[VEC / 2];

  __device__ explicit Maximum(int first_tap) {
#pragma unroll
    for (int p = 0; p < VEC / 2; ++p) {
      largest[p] = bit_copy<uint32_t>(narrow_pair(-INFINITY, -INFINITY, T{}));
      tap[p] = twice(first_tap);
    }
  }

  template <typename ACT>
  __device__ void add(const Vector<T, VEC>& x, const float (&a)[VEC], const float (&b)[VEC], ACT act, int at) {
    const auto y = [&](int k) { return act.before_maximum(a[k] * widen(x.v[k]) + b[k]); };
#pragma unroll
    for (int p = 0; p < VEC / 2; ++p) {
      const Pair pair = narrow_pair(y(2 * p), y(2 * p + 1), T{});
      choose(p, __hgt2_mask(pair, bit_copy<Pair>(largest[p])) | __hneu2_mask(pair, pair), pair, at);
    }
  }

  __device__ void relu(int first_tap) {
    const Pair zero = narrow_pair(0, 0, T{});
#pragma unroll
    for (int p = 0; p < VEC / 2; ++p) choose(p, __hle2_mask(bit_copy<Pair>(largest[p]), zero), zero, first_tap);
  }

  __device__ Vector<T, VEC> result() const { return bit_copy<Vector<T, VEC>>(largest); }

  __device__ Vector<uint8_t, VEC> taps() const {
    Vector<uint8_t, VEC> result;
#pragma unroll
    for (int k = 0; k < VEC; ++k) result.v[k] = static_cast<uint8_t>(tap[k / 2] >> k % 2 * 16);
    return result;
  }

 private:
  __device__ static uint32_t twice(int tap) { return static_cast<uint32_t>(tap) * 0x10001; }

  // The pair and the tap where the mask says so.
  __device__ void choose(int p, uint32_t mask, Pair pair, int at) {
    largest[p] = (bit_copy<uint32_t>(pair) & mask) | (largest[p] & ~mask);
    tap[p] = (twice(at) & mask) | (tap[p] & ~mask);
  }
};

// out = pool(act(scale * x + shift)), and the places of the maxima. Reads the map once (windows that overlap meet in the
// caches) and writes the outputs: 1.25 times the map's bytes for windows of 2 x 2, where the batch norm and the activation
// alone take four.
template <typename T, int VEC, bool MAXIMUM, typename WINDOWS, typename ACT>
__global__ void __launch_bounds__(kReduceThreads, !WINDOWS::kKnown ? 2 : MAXIMUM ? 3 : 4)
    bn_act_pool_fwd_kernel(Share share, WINDOWS windows, Items<const T> x, const wide_t<T>* scale, const wide_t<T>* shift,
                           ACT act, Items<T> out, Items<uint8_t> taps) {
  start_kernel();
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
  using Index = typename WINDOWS::Index;
#pragma unroll 1
  for (Index item = lane.first, step = lane.step, end = lane.end; item < end; item += step) {
    const auto at = windows.at(item, share.sample_items);
    const auto inputs = windows.inputs_of(at);
    auto pool = [&] {
      if constexpr (MAXIMUM)
        return Maximum<T, VEC>(inputs.first_tap());
      else
        return Average<T, VEC>{windows.taps};
    }();
    inputs.template each<2>([&](const auto& places) {
      constexpr int COUNT = places.kCount;
      Vector<T, VEC> values[COUNT];
#pragma unroll
      for (int i = 0; i < COUNT; ++i) values[i] = load<T, VEC>(x.at(at.n, places.position[i], lane.channel));
#pragma unroll
      for (int i = 0; i < COUNT; ++i) pool.add(values[i], a, b, act, places.tap[i][0]);
    });
    if constexpr (MAXIMUM) {
      if (act.is_relu()) pool.relu(inputs.first_tap());
      store(taps.at(at.n, at.s, lane.channel), pool.taps());
    }
    store(out.at(at.n, at.s, lane.channel), pool.result());
  }
}

// What a backward reads of some outputs.
template <typename T, int VEC, int COUNT>
struct PooledGrad {
  Vector<T, VEC> grad[COUNT];
  Vector<uint8_t, VEC> tap[COUNT];
};

// How many blocks a multiprocessor is to hold at least: two, unless what is read at once takes more registers than that leaves.
template <bool MAXIMUM, bool ACCUMULATE, bool KNOWN>
constexpr int kBackwardBlocks = KNOWN && (kPairs ? MAXIMUM || ACCUMULATE : MAXIMUM && ACCUMULATE) ? 1 : 2;

// As `mask_and_sum`, of the gradient that a pool passes back to an input: from every window that covers it its share, or, of
// MAXIMUM, all of it where the input was the largest. Two or three times the map's bytes and the outputs'. An item is a cell of
// inputs: what their windows share is read once, and all of it at once.
template <typename T, int VEC, bool MAXIMUM, bool ACCUMULATE, typename WINDOWS, typename ACT>
__global__ void __launch_bounds__(kReduceThreads, kBackwardBlocks<MAXIMUM, ACCUMULATE, WINDOWS::kKnown>)
    bn_act_pool_bwd_kernel(Share share, WINDOWS windows, Items<const T> grad, Items<const uint8_t> taps,
                           Items<const T> x, Items<T> out, const wide_t<T>* scale, const wide_t<T>* shift,
                           const wide_t<T>* center, ACT act, wide_t<T>* sum_dy, wide_t<T>* sum_dy_xc) {
  start_kernel();
  using W = wide_t<T>;
  constexpr int INPUTS = WINDOWS::kInputs;
  const Lane lane = whole_lane_of<VEC>(share);

  W a[VEC] = {}, b[VEC] = {}, c[VEC] = {};
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    if (k < lane.count) {
      a[k] = scale[lane.channel + k];
      b[k] = shift[lane.channel + k];
      c[k] = center[lane.channel + k];
    }
  }
  const W weight = W(1) / W(windows.taps);
  Sums<W, VEC> sums;
  using Index = typename WINDOWS::Index;
#pragma unroll 1
  for (Index item = lane.first, step = lane.step, end = lane.end; item < end; item += step) {
    const auto at = windows.at(item, share.sample_items);
    Vector<T, VEC> values[INPUTS], results[INPUTS];
#pragma unroll
    for (int i = 0; i < INPUTS; ++i) {
      values[i] = load<T, VEC>(x.at(at.n, windows.input(at, i), lane.channel));
      if constexpr (ACCUMULATE) results[i] = load<T, VEC>(out.at(at.n, windows.input(at, i), lane.channel));
    }
    const auto outputs = windows.outputs_of(at);
    const auto read = [&](const auto& places) {
      PooledGrad<T, VEC, places.kCount> pooled;
#pragma unroll
      for (int o = 0; o < places.kCount; ++o) {
        pooled.grad[o] = load<T, VEC>(grad.at(at.n, places.position[o], lane.channel));
        if constexpr (MAXIMUM) pooled.tap[o] = load<uint8_t, VEC>(taps.at(at.n, places.position[o], lane.channel));
      }
      return pooled;
    };
    const auto gathered = [](const auto& places, const auto& pooled, int i, int k) {
      W g = 0;
#pragma unroll
      for (int o = 0; o < places.kCount; ++o)
        if (MAXIMUM ? pooled.tap[o].v[k] == places.tap[o][i] : places.tap[o][i] >= 0) g += widen(pooled.grad[o].v[k]);
      return g;
    };
    // Channel after channel, whose values take the fewest registers.
    const auto mask = [&](auto gradient) {
#pragma unroll
      for (int k = 0; k < VEC; ++k) {
#pragma unroll
        for (int i = 0; i < INPUTS; ++i) {
          const W g = MAXIMUM ? gradient(i, k) : gradient(i, k) * weight;
          const W before = ACCUMULATE ? widen(results[i].v[k]) : W(0);
          const W result =
              mask_value<ACCUMULATE>(g, widen(values[i].v[k]), before, a[k], b[k], c[k], act, k, sums);
          narrow(result, results[i].v[k]);
        }
      }
#pragma unroll
      for (int i = 0; i < INPUTS; ++i) store(out.at(at.n, windows.input(at, i), lane.channel), results[i]);
    };
    if constexpr (WINDOWS::kKnown) {
      const auto pooled = read(outputs);
      mask([&](int i, int k) { return gathered(outputs, pooled, i, k); });
    } else {
      W g[VEC] = {};
      outputs.template each<1>([&](const auto& places) {
        const auto pooled = read(places);
#pragma unroll
        for (int k = 0; k < VEC; ++k) g[k] += gathered(places, pooled, 0, k);
      });
      mask([&](int, int k) { return g[k]; });
    }
  }
  leave<true>(share, lane, sums, sum_dy, sum_dy_xc);
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
template <typename T, int VEC, typename ACT>
__global__ void __launch_bounds__(kReduceThreads, 2)
    bn_act_global_pool_fwd_kernel(Share share, Items<const T> x, const wide_t<T>* scale, const wide_t<T>* shift,
                                  ACT act, T* out) {
  start_kernel();
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
      for (int u = 0; u < UNROLL; ++u) group += act.value(a[k] * widen(values[0][u].v[k]) + b[k]);
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
