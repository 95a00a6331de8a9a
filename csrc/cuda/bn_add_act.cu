#include "bn_add_act.cuh"

#include <optional>
#include <tuple>

#include "elementwise.h"
#include "reduce.h"

namespace resdense::cuda {
namespace {

Tensor bn_add_act(const Tensor& z, const Tensor& scale, const Tensor& shift, const Tensor& identity,
                  const std::optional<Tensor>& identity_scale, const std::optional<Tensor>& identity_shift,
                  double activation) {
  const Map a = map_of(z, "z"), b = map_of(identity, "identity");
  check_same(identity, "identity", z, "z");
  check_vector(scale, "scale", a.C, z, "z");
  check_vector(shift, "shift", a.C, z, "z");
  const bool projected = identity_scale.has_value();
  RESDENSE_CHECK(projected == identity_shift.has_value(), projected ? "identity_shift" : "identity_scale",
                 ": expected a tensor, as the other of identity_scale and identity_shift is one, got None");
  if (projected) {
    check_vector(*identity_scale, "identity_scale", a.C, z, "z");
    check_vector(*identity_shift, "identity_shift", a.C, z, "z");
  }
  Tensor out = torch::stable::empty_like(z);
  if (a.numel() == 0) return out;

  const Map to = mutable_map_of(out, "out");
  const Launch on(z);
  const WalkPlan p = plan_walk({a, b, to}, true, on.multiprocessors());
  dispatch(a.dtype, activation, [&](auto zero, auto act) {
    using T = decltype(zero);
    using Act = decltype(act);
    const auto vector = [](const Tensor& t) { return static_cast<const wide_t<T>*>(t.const_data_ptr()); };
    const auto start = [&](auto* kernel) {
      on.run(kernel, p.blocks, p.threads, p.walk, items<const T>(p, a), items<const T>(p, b), items<T>(p, to),
             vector(scale), vector(shift), projected ? vector(*identity_scale) : nullptr,
             projected ? vector(*identity_shift) : nullptr, act);
    };
    constexpr int VEC = kVector<T>;
    if (p.vectors)
      start(projected ? bn_add_act_fwd_kernel<T, VEC, true, Act> : bn_add_act_fwd_kernel<T, VEC, false, Act>);
    else
      start(projected ? bn_add_act_fwd_kernel<T, 1, true, Act> : bn_add_act_fwd_kernel<T, 1, false, Act>);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_act_backward(const Tensor& grad, const Tensor& out, const Tensor& z,
                                                               const Tensor& center, const std::optional<Tensor>& identity,
                                                               const std::optional<Tensor>& identity_center,
                                                               double activation) {
  const bool projected = identity.has_value();
  RESDENSE_CHECK(projected == identity_center.has_value(), projected ? "identity_center" : "identity",
                 ": expected a tensor, as the other of identity and identity_center is one, got None");
  RESDENSE_CHECK(activation >= 0, "activation: expected no negative slope, as the sign is told from the output, got ",
                 activation);
  const Map from = map_of(grad, "grad"), y = map_of(out, "out"), a = map_of(z, "z");
  check_same(grad, "grad", out, "out");
  check_same(z, "z", out, "out");
  check_vector(center, "center", y.C, z, "z");
  Map b{};
  if (projected) {
    b = map_of(*identity, "identity");
    check_same(*identity, "identity", out, "out");
    check_vector(*identity_center, "identity_center", y.C, *identity, "identity");
  }
  const Tensor g = torch::stable::empty_like(out);
  const auto [sum_g, sum_g_zc] = new_sums(z, a);
  const Tensor sum_g_ic = projected ? std::get<0>(new_sums(z, a)) : torch::stable::new_empty(z, {0}, stats_dtype(y.dtype));
  if (y.numel() == 0) return {g, sum_g, sum_g_zc, sum_g_ic};

  const Map to = mutable_map_of(g, "g");
  const Launch on(z);
  const ReducePlan p = plan_reduce({to, from, y, a, projected ? b : a}, on.multiprocessors());
  dispatch(y.dtype, activation, [&](auto zero, auto act) {
    using T = decltype(zero);
    using Act = decltype(act);
    using W = wide_t<T>;
    const auto vector = [](const Tensor& t) { return static_cast<const W*>(t.const_data_ptr()); };
    const auto start = [&]<bool PROJECTED>(W* to_g, W* to_g_zc, W* to_g_too, W* to_g_ic) {
      constexpr int VEC = kVector<T>;
      const auto kernel = [&]<bool ROWS>() {
        return p.vectors ? bn_add_act_bwd_kernel<T, VEC, ROWS, PROJECTED, Act>
                         : bn_add_act_bwd_kernel<T, 1, ROWS, PROJECTED, Act>;
      };
      const auto rows = kernel.template operator()<true>(), planes = kernel.template operator()<false>();
      on.run(p.rows ? rows : planes, p.blocks, p.threads, p.share, items<const T>(p, from), items<const T>(p, y),
             items<const T>(p, a), PROJECTED ? items<const T>(p, b) : Items<const T>{}, items<T>(p, to), vector(center),
             PROJECTED ? vector(*identity_center) : nullptr, act, to_g, to_g_zc, to_g_too, to_g_ic);
    };
    reduce<Sums<W, 1>>(on, p, sum_g, sum_g_zc, [&](W* to_g, W* to_g_zc) {
      if (!projected) return start.template operator()<false>(to_g, to_g_zc, nullptr, nullptr);
      reduce<Sums<W, 1>>(on, p, sum_g, sum_g_ic, [&](W* to_g_too, W* to_g_ic) {
        start.template operator()<true>(to_g, to_g_zc, to_g_too, to_g_ic);
      });
    });
  });
  return {g, sum_g, sum_g_zc, sum_g_ic};
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) {
  m.impl("bn_add_act", TORCH_BOX(&bn_add_act));
  m.impl("bn_add_act_backward", TORCH_BOX(&bn_add_act_backward));
}

}  // namespace resdense::cuda
