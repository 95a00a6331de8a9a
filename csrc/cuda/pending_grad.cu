#include "pending_grad.cuh"

#include <optional>

#include "elementwise.h"

namespace resdense::cuda {
namespace {

void finish(const Map& to, const Tensor& dy, const Tensor& z, const Tensor& alpha, const Tensor& beta, const Tensor& delta,
            const std::optional<Tensor>& shift, double negative_slope) {
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
    const auto plain = p.vectors ? pending_grad_kernel<T, kVector<T>, false> : pending_grad_kernel<T, 1, false>;
    const auto masked = p.vectors ? pending_grad_kernel<T, kVector<T>, true> : pending_grad_kernel<T, 1, true>;
    on.run(shift ? masked : plain, p.blocks, p.threads, p.walk, items<const T>(p, g), items<const T>(p, from), items<T>(p, to),
           vector(alpha), vector(beta), vector(delta), shift ? vector(*shift) : nullptr, negative_slope);
  });
}

void pending_grad(const Tensor& dy, const Tensor& z, const Tensor& alpha, const Tensor& beta, const Tensor& delta,
                  const std::optional<Tensor>& shift, double negative_slope) {
  finish(mutable_map_of(dy, "dy"), dy, z, alpha, beta, delta, shift, negative_slope);
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
