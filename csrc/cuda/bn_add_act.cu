#include "bn_add_act.cuh"

#include <optional>

#include "elementwise.h"

namespace resdense::cuda {
namespace {

Tensor bn_add_act(const Tensor& z, const Tensor& scale, const Tensor& shift, const Tensor& identity,
                  const std::optional<Tensor>& identity_scale, const std::optional<Tensor>& identity_shift,
                  double negative_slope) {
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
  const WalkPlan p = plan_walk({a, b, to}, true);
  const Launch on(z);
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto vector = [](const Tensor& t) { return static_cast<const wide_t<T>*>(t.const_data_ptr()); };
    const auto start = [&](auto* kernel) {
      on.run(kernel, p.blocks, p.threads, p.walk, p.positions, operand<const T>(p, a), operand<const T>(p, b),
             operand<T>(p, to), vector(scale), vector(shift), projected ? vector(*identity_scale) : nullptr,
             projected ? vector(*identity_shift) : nullptr, negative_slope);
    };
    constexpr int VEC = kVector<T>;
    if (p.vectors)
      start(projected ? bn_add_act_fwd_kernel<T, VEC, true> : bn_add_act_fwd_kernel<T, VEC, false>);
    else
      start(projected ? bn_add_act_fwd_kernel<T, 1, true> : bn_add_act_fwd_kernel<T, 1, false>);
  });
  return out;
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) { m.impl("bn_add_act", TORCH_BOX(&bn_add_act)); }

}  // namespace resdense::cuda
