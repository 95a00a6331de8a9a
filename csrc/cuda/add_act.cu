#include "add_act.cuh"

#include "elementwise.h"

namespace resdense::cuda {
namespace {

template <typename Kernel>
void launch(const Launch& on, const Map& a, const Map& b, const Map& out, double slope, Kernel kernel) {
  const WalkPlan p = plan_walk({a, b, out}, false);
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto x = operand<const T>(p, a), y = operand<const T>(p, b);
    const auto to = operand<T>(p, out);
    const auto with = static_cast<wide_t<T>>(slope);
    if (p.vectors)
      kernel.template run<T, kVector<T>>(p, on.stream(), x, y, to, with);
    else
      kernel.template run<T, 1>(p, on.stream(), x, y, to, with);
  });
  on.check_launch();
}

struct Forward {
  template <typename T, int VEC, typename... Args>
  void run(const WalkPlan& p, cudaStream_t stream, Args... args) const {
    add_act_fwd_kernel<T, VEC><<<p.blocks, p.threads, 0, stream>>>(p.walk, args...);
  }
};

struct Backward {
  template <typename T, int VEC, typename... Args>
  void run(const WalkPlan& p, cudaStream_t stream, Args... args) const {
    add_act_bwd_kernel<T, VEC><<<p.blocks, p.threads, 0, stream>>>(p.walk, args...);
  }
};

Tensor add_act(const Tensor& x, const Tensor& y, double negative_slope) {
  const Map a = map_of(x, "x"), b = map_of(y, "y");
  check_same(y, "y", x, "x");
  Tensor out = torch::stable::empty_like(x);
  if (a.numel() != 0) launch(Launch(x), a, b, mutable_map_of(out, "out"), negative_slope, Forward{});
  return out;
}

Tensor add_act_backward(const Tensor& grad, const Tensor& out, double negative_slope) {
  const Map g = map_of(grad, "grad"), y = map_of(out, "out");
  check_same(grad, "grad", out, "out");
  RESDENSE_CHECK(negative_slope >= 0, "negative_slope: expected 0 or more (the output must tell the sign), got ",
                 negative_slope);
  Tensor dx = torch::stable::empty_like(out);
  if (y.numel() != 0) launch(Launch(out), g, y, mutable_map_of(dx, "dx"), negative_slope, Backward{});
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resdense, CUDA, m) {
  m.impl("add_act", TORCH_BOX(&add_act));
  m.impl("add_act_backward", TORCH_BOX(&add_act_backward));
}

}  // namespace resdense::cuda
