#include "add_act.cuh"

#include "elementwise.h"

namespace resdense::cuda {
namespace {

Tensor add_act(const Tensor& x, const Tensor& y, double activation) {
  const Map a = map_of(x, "x"), b = map_of(y, "y");
  check_same(y, "y", x, "x");
  Tensor out = torch::stable::empty_like(x);
  if (a.numel() == 0) return out;

  const Map to = mutable_map_of(out, "out");
  const Launch on(x);
  const WalkPlan p = plan_walk({a, b, to}, false, on.multiprocessors());
  dispatch(a.dtype, activation, [&](auto zero, auto act) {
    using T = decltype(zero);
    using Act = decltype(act);
    on.run(p.vectors ? add_act_fwd_kernel<T, kVector<T>, Act> : add_act_fwd_kernel<T, 1, Act>, p.blocks, p.threads, p.walk,
           items<const T>(p, a), items<const T>(p, b), items<T>(p, to), act);
  });
  return out;
}

Tensor add_act_backward(const Tensor& grad, const Tensor& out, double activation) {
  const Map g = map_of(grad, "grad"), y = map_of(out, "out");
  check_same(grad, "grad", out, "out");
  RESDENSE_CHECK(activation >= 0, "activation: expected no negative slope, as the sign is told from the output, got ",
                 activation);
  Tensor dx = torch::stable::empty_like(out);
  if (y.numel() == 0) return dx;

  const Map to = mutable_map_of(dx, "dx");
  const Launch on(out);
  const WalkPlan p = plan_walk({g, y, to}, false, on.multiprocessors());
  dispatch(y.dtype, activation, [&](auto zero, auto act) {
    using T = decltype(zero);
    using Act = decltype(act);
    on.run(p.vectors ? add_act_bwd_kernel<T, kVector<T>, Act> : add_act_bwd_kernel<T, 1, Act>, p.blocks, p.threads, p.walk,
           items<const T>(p, g), items<const T>(p, y), items<T>(p, to), act);
  });
  return dx;
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) {
  m.impl("add_act", TORCH_BOX(&add_act));
  m.impl("add_act_backward", TORCH_BOX(&add_act_backward));
}

}  // namespace resdense::cuda
