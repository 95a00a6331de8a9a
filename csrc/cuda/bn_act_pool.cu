#include "bn_act_pool.cuh"

#include <optional>
#include <type_traits>

#include "reduce.h"

namespace resdense::cuda {
namespace {

// Whether the channels of every position are whole vectors, with none cut off: the loops over windows have no case for that.
bool whole_vectors(std::initializer_list<Map> maps, int64_t length) {
  return std::all_of(maps.begin(), maps.end(), [&](const Map& m) {
    return m.channels_last && aligned(m.data) && m.C % length == 0 && (m.N == 1 || m.sn % length == 0) &&
           (m.S == 1 || m.ss % length == 0);
  });
}

// Enough blocks that the last of them leave little of the device idle for long, and few enough that what each begins and ends
// with is little beside its work.
constexpr int64_t kPoolBlocksPerMultiprocessor = 12;

// Windows need to know the sample of every item. A thread takes at most so many items.
ReducePlan plan_pool(std::initializer_list<Map> maps, const Launch& on, bool vectors, int64_t most) {
  ReducePlan p = plan_reduce(maps, on.multiprocessors(), vectors);
  Share& s = p.share;
  s.sample_items = maps.begin()->S;
  const int64_t rows = p.threads / s.tx, chunks = ceil_div(on.multiprocessors() * kPoolBlocksPerMultiprocessor, s.tiles);
  s.chunk_items = std::clamp<int64_t>(s.items / (chunks * rows), 1, most) * rows;
  p.chunks = ceil_div(s.items, s.chunk_items);
  p.blocks = p.chunks * s.tiles;
  return p;
}

// Those of DenseNets and ResNets.
using KnownAverage = FixedWindows<2, 2, 0>;
using KnownMaximum = FixedWindows<3, 2, 1>;

// Calls f<VEC>(windows); where maps have whole vectors and the windows are KNOWN, then with what the compiler knows of those.
template <typename T, typename KNOWN, typename ACT, typename F>
void with_windows(const WindowSizes& sizes, int64_t samples, bool vectors, F f) {
  // The curves of all that those read at once would not fit into the registers.
  using Fitting = std::conditional_t<ACT::kCurve && KNOWN::kKnown, Windows, KNOWN>;
  if (!vectors)
    f.template operator()<1>(Windows(sizes));
  else if (KNOWN::fit(sizes, samples))
    f.template operator()<kVector<T>>(Fitting(sizes));
  else
    f.template operator()<kVector<T>>(Windows(sizes));
}

template <typename T>
Items<T> items(const Map& m) {
  return {static_cast<T*>(m.data), m.sn, m.ss, m.sc};
}

template <bool MAXIMUM, typename KNOWN>
void pool(const Tensor& x, const Tensor& scale, const Tensor& shift, double activation, const WindowSizes& sizes,
          const Tensor& out, const std::optional<Tensor>& taps) {
  const Map from = map_of(x, "x"), to = mutable_map_of(out, "out");
  const Map chosen = MAXIMUM ? mutable_byte_map_of(*taps, "taps") : to;
  check_dtype(out, "out", from.dtype);
  check_pooled(out, "out", x, sizes);
  if (MAXIMUM) check_pooled(*taps, "taps", x, sizes);
  check_vector(scale, "scale", from.C, x, "x");
  check_vector(shift, "shift", from.C, x, "x");
  if (from.numel() == 0) return;

  const Launch on(x);
  const ReducePlan p = plan_pool({to}, on, whole_vectors({from, to, chosen}, vector_length(from.dtype)), kMostItems / 4);
  dispatch(from.dtype, activation, [&](auto zero, auto act) {
    using T = decltype(zero);
    using Act = decltype(act);
    const auto vector = [](const Tensor& t) { return static_cast<const wide_t<T>*>(t.const_data_ptr()); };
    with_windows<T, KNOWN, Act>(sizes, from.N, p.vectors, [&]<int VEC, typename W>(const W& windows) {
      on.run(bn_act_pool_fwd_kernel<T, VEC, MAXIMUM, W, Act>, p.blocks, p.threads, p.share, windows, items<const T>(from),
             vector(scale), vector(shift), act, items<T>(to),
             MAXIMUM ? items<uint8_t>(chosen) : Items<uint8_t>{});
    });
  });
}

void bn_act_avg_pool(const Tensor& x, const Tensor& scale, const Tensor& shift, double activation,
                     const Sizes& kernel_size, const Sizes& stride, const Sizes& padding, const Tensor& out) {
  pool<false, KnownAverage>(x, scale, shift, activation, windows_of(x, kernel_size, stride, padding), out, {});
}

void bn_act_max_pool(const Tensor& x, const Tensor& scale, const Tensor& shift, double activation,
                     const Sizes& kernel_size, const Sizes& stride, const Sizes& padding, const Tensor& out,
                     const Tensor& taps) {
  const WindowSizes windows = windows_of(x, kernel_size, stride, padding);
  check_taps(windows);
  pool<true, KnownMaximum>(x, scale, shift, activation, windows, out, taps);
}

Tensor bn_act_global_pool(const Tensor& x, const Tensor& scale, const Tensor& shift, double activation) {
  const Map from = map_of(x, "x");
  check_spatial(x);
  check_vector(scale, "scale", from.C, x, "x");
  check_vector(shift, "shift", from.C, x, "x");
  Sizes shape(x.dim(), 1);
  shape[0] = from.N, shape[1] = from.C;
  Tensor out = torch::stable::new_empty(x, shape);
  if (from.numel() == 0) return out;

  // The plan of a single sample, every one of which is then a chunk.
  Map sample = from;
  sample.N = 1;
  const Launch on(x);
  const bool vectors = whole_vectors({from}, vector_length(from.dtype));
  ReducePlan p = plan_pool({sample}, on, vectors, kMostItems);
  p.share.items = from.rows();
  p.share.chunk_items = from.S;
  dispatch(from.dtype, activation, [&](auto zero, auto act) {
    using T = decltype(zero);
    using Act = decltype(act);
    const auto vector = [](const Tensor& t) { return static_cast<const wide_t<T>*>(t.const_data_ptr()); };
    on.run(vectors ? bn_act_global_pool_fwd_kernel<T, kVector<T>, Act> : bn_act_global_pool_fwd_kernel<T, 1, Act>,
           from.N * p.share.tiles, p.threads, p.share, items<const T>(from), vector(scale), vector(shift), act,
           static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

template <bool MAXIMUM, typename KNOWN>
std::tuple<Tensor, Tensor> pool_backward(const Tensor& grad, const std::optional<Tensor>& taps, const Tensor& x,
                                         const Tensor& scale, const Tensor& shift, const Tensor& center,
                                         double activation, const WindowSizes& sizes, const Tensor& out,
                                         bool accumulate) {
  const Map from = map_of(x, "x"), g = map_of(grad, "grad"), to = mutable_map_of(out, "out");
  const Map chosen = MAXIMUM ? byte_map_of(*taps, "taps") : g;
  check_dtype(grad, "grad", from.dtype);
  check_pooled(grad, "grad", x, sizes);
  if (MAXIMUM) check_pooled(*taps, "taps", x, sizes);
  check_same(out, "out", x, "x");
  check_vector(scale, "scale", from.C, x, "x");
  check_vector(shift, "shift", from.C, x, "x");
  check_vector(center, "center", from.C, x, "x");
  const std::tuple<Tensor, Tensor> sums = new_sums(x, from);
  if (from.numel() == 0) return sums;

  const Launch on(x);
  const bool vectors = whole_vectors({from, to, g, chosen}, vector_length(from.dtype));
  dispatch(from.dtype, activation, [&](auto zero, auto act) {
    using T = decltype(zero);
    using Act = decltype(act);
    const auto vector = [](const Tensor& t) { return static_cast<const wide_t<T>*>(t.const_data_ptr()); };
    with_windows<T, KNOWN, Act>(sizes, from.N, vectors, [&]<int VEC, typename W>(const W& windows) {
      // As many cells of several inputs as outputs.
      const ReducePlan p = plan_pool({W::kInputs > 1 ? g : from}, on, vectors, kMostItems / W::kInputs);
      reduce<Sums<wide_t<T>, 1>>(on, p, std::get<0>(sums), std::get<1>(sums), [&](auto* to_dy, auto* to_dy_xc) {
        on.run(accumulate ? bn_act_pool_bwd_kernel<T, VEC, MAXIMUM, true, W, Act>
                          : bn_act_pool_bwd_kernel<T, VEC, MAXIMUM, false, W, Act>,
               p.blocks, p.threads, p.share, windows, items<const T>(g),
               MAXIMUM ? items<const uint8_t>(chosen) : Items<const uint8_t>{}, items<const T>(from), items<T>(to),
               vector(scale), vector(shift), vector(center), act, to_dy, to_dy_xc);
      });
    });
  });
  return sums;
}

std::tuple<Tensor, Tensor> bn_act_avg_pool_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                    const Tensor& shift, const Tensor& center, double activation,
                                                    const Sizes& kernel_size, const Sizes& stride, const Sizes& padding,
                                                    const Tensor& out, bool accumulate) {
  const WindowSizes windows = windows_of(x, kernel_size, stride, padding);
  return pool_backward<false, KnownAverage>(grad, {}, x, scale, shift, center, activation, windows, out, accumulate);
}

std::tuple<Tensor, Tensor> bn_act_max_pool_backward(const Tensor& grad, const Tensor& taps, const Tensor& x,
                                                    const Tensor& scale, const Tensor& shift, const Tensor& center,
                                                    double activation, const Sizes& kernel_size, const Sizes& stride,
                                                    const Sizes& padding, const Tensor& out, bool accumulate) {
  const WindowSizes windows = windows_of(x, kernel_size, stride, padding);
  check_taps(windows);
  return pool_backward<true, KnownMaximum>(grad, taps, x, scale, shift, center, activation, windows, out, accumulate);
}

// The average over the one window that holds everything.
std::tuple<Tensor, Tensor> bn_act_global_pool_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                       const Tensor& shift, const Tensor& center, double activation,
                                                       const Tensor& out, bool accumulate) {
  return pool_backward<false, WholeWindow>(grad, {}, x, scale, shift, center, activation, whole(x), out, accumulate);
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) {
  m.impl("bn_act_avg_pool", TORCH_BOX(&bn_act_avg_pool));
  m.impl("bn_act_avg_pool_backward", TORCH_BOX(&bn_act_avg_pool_backward));
  m.impl("bn_act_max_pool", TORCH_BOX(&bn_act_max_pool));
  m.impl("bn_act_max_pool_backward", TORCH_BOX(&bn_act_max_pool_backward));
  m.impl("bn_act_global_pool", TORCH_BOX(&bn_act_global_pool));
  m.impl("bn_act_global_pool_backward", TORCH_BOX(&bn_act_global_pool_backward));
}

}  // namespace resdense::cuda
