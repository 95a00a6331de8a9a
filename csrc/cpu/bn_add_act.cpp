// The end of a residual block: act(bn(z) + identity), the identity behind a norm of its own or not, and its backward up to the
// norms, which tells the derivative of the activation from its output.

#include <functional>

#include <torch/csrc/stable/library.h>

#include "sweep_maps.h"

namespace resdense::cpu {

Tensor bn_add_act(const Tensor& z, const Tensor& scale, const Tensor& shift, const Tensor& identity,
                  const std::optional<Tensor>& identity_scale, const std::optional<Tensor>& identity_shift,
                  double activation) {
  const bool projected = identity_scale.has_value();
  RESDENSE_CHECK(projected == identity_shift.has_value(), projected ? "identity_shift" : "identity_scale",
                 ": expected a tensor, as the other of identity_scale and identity_shift is one, got None");
  check_same(identity, "identity", z, "z");
  const Tensor out = torch::stable::empty_like(z);
  Map a = map_of(z, "z"), b = map_of(identity, "identity"), to = mutable_map_of(out, "out");
  unify({&a, &b, &to}, "bn_add_act");
  Sweep s{projected ? Pass::add_scaled : Pass::add};
  s.coef[0] = coefficients(scale, "scale", a.C, z), s.coef[1] = coefficients(shift, "shift", a.C, z);
  Tensor both = shift;
  if (projected) {
    s.coef[2] = coefficients(*identity_scale, "identity_scale", a.C, z);
    const void* other = coefficients(*identity_shift, "identity_shift", a.C, z);
    both = torch::stable::empty({a.C}, shift.scalar_type());
    const auto add = [&](auto type) {
      using A = decltype(type);
      const A *x = static_cast<const A*>(s.coef[1]), *y = static_cast<const A*>(other);
      std::transform(x, x + a.C, y, static_cast<A*>(both.mutable_data_ptr()), std::plus<A>());
    };
    a.dtype == ScalarType::Double ? add(double{}) : add(float{});
    s.coef[1] = both.const_data_ptr();
  }
  s.activation = activation;
  sweep_maps(s, {&a, &b}, to);
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
  check_same(grad, "grad", z, "z");
  check_same(out, "out", z, "z");
  const Tensor g = torch::stable::empty_like(z);
  Map from = map_of(grad, "grad"), y = map_of(out, "out"), a = map_of(z, "z"), to = mutable_map_of(g, "g"), b = a;
  Sweep s{projected ? Pass::unmask_both : Pass::unmask};
  s.coef[0] = coefficients(center, "center", a.C, z), s.activation = activation;
  Sums sums(torch::stable::get_num_threads(), a.C, projected ? 3 : 2);
  if (projected) {
    check_same(*identity, "identity", z, "z");
    b = map_of(*identity, "identity");
    s.coef[1] = coefficients(*identity_center, "identity_center", a.C, z);
    unify({&from, &y, &a, &b, &to}, "bn_add_act_backward");
    sweep_maps(s, {&from, &y, &a, &b}, to, &sums);
  } else {
    unify({&from, &y, &a, &to}, "bn_add_act_backward");
    sweep_maps(s, {&from, &y, &a}, to, &sums);
  }
  return {g, sums.total(0, a), sums.total(1, a), projected ? sums.total(2, a) : vector_of(0, a)};
}

}  // namespace resdense::cpu

STABLE_TORCH_LIBRARY_IMPL(resdense, CPU, m) {
  m.impl("bn_add_act", TORCH_BOX(&resdense::cpu::bn_add_act));
  m.impl("bn_add_act_backward", TORCH_BOX(&resdense::cpu::bn_add_act_backward));
}
