#include "pending_grad.cuh"

#include "elementwise.h"

namespace resdense::cuda {
namespace {

void pending_grad(const Tensor& dy, const Tensor& z, const Tensor& alpha, const Tensor& beta, const Tensor& delta) {
  const Map to = mutable_map_of(dy, "dy"), from = map_of(z, "z");
  check_same(z, "z", dy, "dy");
  check_vector(alpha, "alpha", to.C, dy, "dy");
  check_vector(beta, "beta", to.C, dy, "dy");
  check_vector(delta, "delta", to.C, dy, "dy");
  if (to.numel() == 0) return;

  const Launch on(dy);
  const WalkPlan p = plan_walk({to, from}, true, on.multiprocessors());
  dispatch(to.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto vector = [](const Tensor& t) { return static_cast<const wide_t<T>*>(t.const_data_ptr()); };
    on.run(p.vectors ? pending_grad_kernel<T, kVector<T>> : pending_grad_kernel<T, 1>, p.blocks, p.threads, p.walk,
           items<const T>(p, to), items<const T>(p, from), items<T>(p, to), vector(alpha), vector(beta), vector(delta));
  });
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) { m.impl("pending_grad", TORCH_BOX(&pending_grad)); }

}  // namespace resdense::cuda
