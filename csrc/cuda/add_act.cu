#include "add_act.cuh"

#include "elementwise.h"

namespace resdense::cuda {
namespace {

Tensor add_act(const Tensor& x, const Tensor& y, double negative_slope) {
  const Map a = map_of(x, "x"), b = map_of(y, "y");
  check_same(y, "y", x, "x");
  Tensor out = torch::stable::empty_like(x);
  if (a.numel() == 0) return out;

  const Map to = mutable_map_of(out, "out");
  const WalkPlan p = plan_walk({a, b, to}, false);
  const Launch on(x);
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    on.run(p.vectors ? add_act_fwd_kernel<T, kVector<T>> : add_act_fwd_kernel<T, 1>, p.blocks, p.threads, p.walk,
           operand<const T>(p, a), operand<const T>(p, b), operand<T>(p, to), negative_slope);
  });
  return out;
}

Tensor add_act_backward(const Tensor& grad, const Tensor& out, double negative_slope) {
  const Map g = map_of(grad, "grad"), y = map_of(out, "out");
  check_same(grad, "grad", out, "out");
  RESDENSE_CHECK(negative_slope >= 0, "negative_slope: expected 0 or more (the output must tell the sign), got ",
                 negative_slope);
  Tensor dx = torch::stable::empty_like(out);
  if (y.numel() == 0) return dx;

  const Map to = mutable_map_of(dx, "dx");
  const WalkPlan p = plan_walk({g, y, to}, false);
  const Launch on(out);
  dispatch(y.dtype, [&](auto zero) {
    using T = decltype(zero);
    on.run(p.vectors ? add_act_bwd_kernel<T, kVector<T>> : add_act_bwd_kernel<T, 1>, p.blocks, p.threads, p.walk,
           operand<const T>(p, g), operand<const T>(p, y), operand<T>(p, to), negative_slope);
  });
  return dx;
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) {
  m.impl("add_act", TORCH_BOX(&add_act));
  m.impl("add_act_backward", TORCH_BOX(&add_act_backward));
}

}  // namespace resdense::cuda
