#include "pending_grad.cuh"

#include <optional>

#include "elementwise.h"

namespace resdense::cuda {
namespace {

void finish(const Map& to, const Tensor& dy, const Tensor& z, const Tensor& alpha, const Tensor& beta, const Tensor& delta,
            const std::optional<Tensor>& shift, double activation) {
  const Map g = map_of(dy, "dy"), from = map_of(z, "z");
  check_same(z, "z", dy, "dy");
  check_vector(alpha, "alpha", to.C, dy, "dy");
  check_vector(beta, "beta", to.C, dy, "dy");
  check_vector(delta, "delta", to.C, dy, "dy");
  if (shift) check_vector(*shift, "shift", to.C, dy, "dy");
  if (to.numel() == 0) return;

  const Launch on(dy);
  const WalkPlan p = plan_walk({to, g, from}, true, on.multiprocessors());
  dispatch(to.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto vector = [](const Tensor& t) { return static_cast<const wide_t<T>*>(t.const_data_ptr()); };
    const auto start = [&](auto act) {
      using Act = decltype(act);
      on.run(p.vectors ? pending_grad_kernel<T, kVector<T>, Act> : pending_grad_kernel<T, 1, Act>, p.blocks, p.threads, p.walk,
             items<const T>(p, g), items<const T>(p, from), items<T>(p, to), vector(alpha), vector(beta), vector(delta),
             shift ? vector(*shift) : nullptr, act);
    };
    if (shift)
      with_activation<wide_t<T>>(activation, start);
    else
      start(Unmasked{});
  });
}

void pending_grad(const Tensor& dy, const Tensor& z, const Tensor& alpha, const Tensor& beta, const Tensor& delta,
                  const std::optional<Tensor>& shift, double activation) {
  finish(mutable_map_of(dy, "dy"), dy, z, alpha, beta, delta, shift, activation);
}

Tensor finished_grad(const Tensor& dy, const Tensor& z, const Tensor& alpha, const Tensor& beta, const Tensor& delta) {
  const Tensor out = torch::stable::empty_like(dy);
  finish(mutable_map_of(out, "out"), dy, z, alpha, beta, delta, std::nullopt, 1);
  return out;
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) {
  m.impl("pending_grad", TORCH_BOX(&pending_grad));
  m.impl("finished_grad", TORCH_BOX(&finished_grad));
}

}  // namespace resdense::cuda
