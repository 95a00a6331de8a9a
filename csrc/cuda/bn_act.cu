#include "bn_act.cuh"

#include "elementwise.h"
#include "reduce.h"

namespace resdense::cuda {
namespace {

void bn_act(const Tensor& x, const Tensor& scale, const Tensor& shift, double activation, const Tensor& out) {
  const Map from = map_of(x, "x"), to = mutable_map_of(out, "out");
  check_same(out, "out", x, "x");
  check_vector(scale, "scale", from.C, x, "x");
  check_vector(shift, "shift", from.C, x, "x");
  if (from.numel() == 0) return;

  const Launch on(x);
  const WalkPlan p = plan_walk({from, to}, true, on.multiprocessors());
  dispatch(from.dtype, activation, [&](auto zero, auto act) {
    using T = decltype(zero);
    using Act = decltype(act);
    const auto vector = [](const Tensor& t) { return static_cast<const wide_t<T>*>(t.const_data_ptr()); };
    on.run(p.vectors ? bn_act_fwd_kernel<T, kVector<T>, Act> : bn_act_fwd_kernel<T, 1, Act>, p.blocks, p.threads, p.walk,
           items<const T>(p, from), items<T>(p, to), vector(scale), vector(shift), act);
  });
}

template <bool WRITE, bool ACCUMULATE>
std::tuple<Tensor, Tensor> mask_and_sum(const Tensor& out, const Tensor& grad, const Tensor& x, const Tensor& scale,
                                        const Tensor& shift, const Tensor& center, double activation) {
  const Map from = map_of(x, "x"), g = map_of(grad, "grad");
  const Map to = WRITE ? mutable_map_of(out, ACCUMULATE ? "out" : "grad") : g;
  check_same(grad, "grad", x, "x");
  check_same(out, "out", x, "x");
  check_vector(scale, "scale", from.C, x, "x");
  check_vector(shift, "shift", from.C, x, "x");
  check_vector(center, "center", from.C, x, "x");
  const std::tuple<Tensor, Tensor> sums = new_sums(x, from);
  if (from.numel() == 0) return sums;

  const Launch on(x);
  const ReducePlan p = plan_reduce({g, from, to}, on.multiprocessors());
  dispatch(from.dtype, activation, [&](auto zero, auto act) {
    using T = decltype(zero);
    using Act = decltype(act);
    using W = wide_t<T>;
    constexpr int VEC = kVector<T>;
    const auto vector = [](const Tensor& t) { return static_cast<const W*>(t.const_data_ptr()); };
    const auto kernel = [&]<bool ROWS>() {
      return p.vectors ? bn_act_bwd_kernel<T, VEC, ROWS, WRITE, ACCUMULATE, Act>
                       : bn_act_bwd_kernel<T, 1, ROWS, WRITE, ACCUMULATE, Act>;
    };
    const auto rows = kernel.template operator()<true>(), planes = kernel.template operator()<false>();
    reduce<Sums<W, 1>>(on, p, std::get<0>(sums), std::get<1>(sums), [&](W* to_dy, W* to_dy_xc) {
      on.run(p.rows ? rows : planes, p.blocks, p.threads, p.share, items<const T>(p, g), items<const T>(p, from),
             items<T>(p, to), vector(scale), vector(shift), vector(center), act, to_dy, to_dy_xc);
    });
  });
  return sums;
}

std::tuple<Tensor, Tensor> bn_act_backward(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& shift,
                                           const Tensor& center, double activation) {
  return mask_and_sum<true, false>(grad, grad, x, scale, shift, center, activation);
}

std::tuple<Tensor, Tensor> bn_act_backward_accumulate(const Tensor& out, const Tensor& grad, const Tensor& x,
                                                      const Tensor& scale, const Tensor& shift, const Tensor& center,
                                                      double activation) {
  return mask_and_sum<true, true>(out, grad, x, scale, shift, center, activation);
}

std::tuple<Tensor, Tensor> bn_act_sums(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& shift,
                                       const Tensor& center, double activation) {
  return mask_and_sum<false, false>(grad, grad, x, scale, shift, center, activation);
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) {
  m.impl("bn_act", TORCH_BOX(&bn_act));
  m.impl("bn_act_sums", TORCH_BOX(&bn_act_sums));
  m.impl("bn_act_backward", TORCH_BOX(&bn_act_backward));
  m.impl("bn_act_backward_accumulate", TORCH_BOX(&bn_act_backward_accumulate));
}

}  // namespace resdense::cuda
