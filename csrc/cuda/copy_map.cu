#include "copy_map.cuh"

#include "elementwise.h"

namespace resdense::cuda {
namespace {

template <typename From, typename To>
void run(const Launch& on, const Map& from, const Map& to) {
  // A map of one channel or one position has nothing to transpose.
  if (from.channels_last != to.channels_last && from.C > 1 && from.S > 1) {
    const bool last = from.channels_last;
    Transpose t{};
    t.rows = last ? from.S : from.C, t.columns = last ? from.C : from.S;
    t.row_tiles = ceil_div(t.rows, kTile), t.column_tiles = ceil_div(t.columns, kTile);
    t.x_sn = from.sn, t.x_row = last ? from.ss : from.sc;
    t.out_sn = to.sn, t.out_column = last ? to.sc : to.ss;
    on.run(copy_map_transpose_kernel<From, To>, from.N * t.row_tiles * t.column_tiles, kTile * kTileRows, t,
           static_cast<const From*>(from.data), static_cast<To*>(to.data));
    return;
  }
  const WalkPlan p = plan_walk({from, to}, false, on.multiprocessors());
  on.run(p.vectors ? copy_map_kernel<From, To, kCopyVector<From, To>> : copy_map_kernel<From, To, 1>, p.blocks, p.threads,
         p.walk, items<const From>(p, from), items<To>(p, to));
}

void copy_map(const Tensor& x, const Tensor& out) {
  const Map from = map_of(x, "x"), to = mutable_map_of(out, "out");
  check_same_device(out, "out", x, "x");
  check_same_shape(out, "out", x, "x");
  if (from.numel() == 0) return;

  const Launch on(x);
  dispatch(from.dtype, [&](auto source) {
    dispatch(to.dtype, [&](auto target) { run<decltype(source), decltype(target)>(on, from, to); });
  });
}

}  // namespace

RESDENSE_CUDA_OPERATORS(m) { m.impl("copy_map", TORCH_BOX(&copy_map)); }

}  // namespace resdense::cuda
