// The elementwise primitives: batch norm and activation folded into one affine, its backward, a gradient's last step.

#include <torch/csrc/stable/library.h>

#include "sweep_maps.h"

namespace resdense::cpu {
void bn_act(const Tensor& x, const Tensor& scale, const Tensor& shift, double activation, const Tensor& out) {
  check_same(out, "out", x, "x");
  Map from = map_of(x, "x"), to = mutable_map_of(out, "out");
  unify({&from, &to}, "bn_act");
  Sweep s{Pass::act};
  s.coef[0] = coefficients(scale, "scale", from.C, x), s.coef[1] = coefficients(shift, "shift", from.C, x);
  s.activation = activation;
  sweep_maps(s, {&from}, to);
}

std::tuple<Tensor, Tensor> mask_and_sum(Pass pass, const Tensor& out, const Tensor& grad, const Tensor& x, const Tensor& scale,
                                        const Tensor& shift, const Tensor& center, double activation, const char* op) {
  check_same(grad, "grad", x, "x");
  check_same(out, "out", x, "x");
  Map g = map_of(grad, "grad"), from = map_of(x, "x"), to = mutable_map_of(out, "out");
  unify({&g, &from, &to}, op);
  Sweep s{pass};
  s.coef[0] = coefficients(scale, "scale", from.C, x), s.coef[1] = coefficients(shift, "shift", from.C, x);
  s.coef[2] = coefficients(center, "center", from.C, x);
  s.activation = activation;
  Sums sums(torch::stable::get_num_threads(), from.C);
  sweep_maps(s, {&g, &from, &to}, to, &sums);
  return {sums.total(0, from), sums.total(1, from)};
}

std::tuple<Tensor, Tensor> bn_act_backward(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& shift,
                                           const Tensor& center, double activation) {
  return mask_and_sum(Pass::mask, grad, grad, x, scale, shift, center, activation, "bn_act_backward");
}

std::tuple<Tensor, Tensor> bn_act_backward_accumulate(const Tensor& out, const Tensor& grad, const Tensor& x,
                                                      const Tensor& scale, const Tensor& shift, const Tensor& center,
                                                      double activation) {
  return mask_and_sum(Pass::mask_accumulate, out, grad, x, scale, shift, center, activation,
                      "bn_act_backward_accumulate");
}

// What `bn_act_backward` returns.
std::tuple<Tensor, Tensor> bn_act_sums(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& shift,
                                       const Tensor& center, double activation) {
  return bn_act_backward(torch::stable::clone(grad), x, scale, shift, center, activation);
}

void pending_grad(const Tensor& dy, const Tensor& z, const Tensor& alpha, const Tensor& beta, const Tensor& delta,
                  const std::optional<Tensor>& shift, double activation) {
  check_same(z, "z", dy, "dy");
  Map to = mutable_map_of(dy, "dy"), from = map_of(z, "z");
  unify({&to, &from}, "pending_grad");
  Sweep s{Pass::pending};
  s.coef[0] = coefficients(alpha, "alpha", to.C, dy), s.coef[1] = coefficients(beta, "beta", to.C, dy);
  s.coef[2] = coefficients(delta, "delta", to.C, dy);
  if (shift) bn_act_backward(dy, z, alpha, *shift, alpha, activation);
  sweep_maps(s, {&to, &from}, to);
}

Tensor finished_grad(const Tensor& dy, const Tensor& z, const Tensor& alpha, const Tensor& beta, const Tensor& delta) {
  const Tensor out = torch::stable::clone(dy);
  pending_grad(out, z, alpha, beta, delta, std::nullopt, 1);
  return out;
}

}  // namespace resdense::cpu

STABLE_TORCH_LIBRARY_IMPL(resdense, CPU, m) {
  m.impl("bn_act", TORCH_BOX(&resdense::cpu::bn_act));
  m.impl("bn_act_sums", TORCH_BOX(&resdense::cpu::bn_act_sums));
  m.impl("bn_act_backward", TORCH_BOX(&resdense::cpu::bn_act_backward));
  m.impl("bn_act_backward_accumulate", TORCH_BOX(&resdense::cpu::bn_act_backward_accumulate));
  m.impl("finished_grad", TORCH_BOX(&resdense::cpu::finished_grad));
  m.impl("pending_grad", TORCH_BOX(&resdense::cpu::pending_grad));
}
