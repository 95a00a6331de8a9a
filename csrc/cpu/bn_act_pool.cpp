// Average, maximum and global pools of act(scale * x + shift), which is never in memory, and their backward, in one pass each.

#include <optional>

#include <torch/csrc/stable/library.h>

#include "tile.h"

namespace resdense::cpu {
namespace {

// One layout for all maps where they have one; else lanes are channels, wherever these are.
bool all_planes(std::initializer_list<Map*> maps) {
  for (Map* m : maps) {
    if (m->channels_last && m->C == 1 && m->ss == 1) m->channels_last = false, m->sc = m->S;
    if (m->channels_last) return false;
  }
  return true;
}

// f(chunk, first item, end): a share of the items for every thread, in order.
template <class F> void deal(int64_t items, int64_t chunks, const F& f) {
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) f(chunk, items * chunk / chunks, items * (chunk + 1) / chunks);
  });
}

int64_t chunks_of(int64_t items) { return std::min<int64_t>(items, torch::stable::get_num_threads()); }

void pool(const Tensor& x, const Tensor& scale, const Tensor& shift, double activation, const WindowSizes& windows,
          const Tensor& out, const std::optional<Tensor>& taps) {
  Map from = map_of(x, "x"), to = mutable_map_of(out, "out");
  Map chosen = taps ? mutable_byte_map_of(*taps, "taps") : to;
  check_dtype(out, "out", from.dtype);
  check_pooled(out, "out", x, windows);
  if (taps) check_pooled(*taps, "taps", x, windows);
  Pooling p{taps.has_value(), false, from.dtype, windows, from.C};
  p.coef[0] = coefficients(scale, "scale", from.C, x), p.coef[1] = coefficients(shift, "shift", from.C, x);
  p.activation = activation;
  if (from.numel() == 0) return;
  p.planes = all_planes({&from, &to, &chosen});
  p.x = operand(from), p.pooled = operand(to), p.taps = operand(chosen);
  const int64_t items = p.items(from.N, false), chunks = chunks_of(items);
  const Scratch scratch(chunks, p.scratch_bytes());
  deal(items, chunks, [&](int64_t chunk, int64_t begin, int64_t end) { kernels.pool_forward(p, begin, end, scratch.of(chunk)); });
}

std::tuple<Tensor, Tensor> pool_backward(const Tensor& grad, const std::optional<Tensor>& taps, const Tensor& x,
                                         const Tensor& scale, const Tensor& shift, const Tensor& center,
                                         double activation, const WindowSizes& windows, const Tensor& out,
                                         bool accumulate) {
  Map from = map_of(x, "x"), g = map_of(grad, "grad"), to = mutable_map_of(out, "out");
  Map chosen = taps ? byte_map_of(*taps, "taps") : g;
  check_dtype(grad, "grad", from.dtype);
  check_pooled(grad, "grad", x, windows);
  if (taps) check_pooled(*taps, "taps", x, windows);
  check_same(out, "out", x, "x");
  Pooling p{taps.has_value(), false, from.dtype, windows, from.C};
  p.coef[0] = coefficients(scale, "scale", from.C, x), p.coef[1] = coefficients(shift, "shift", from.C, x);
  p.coef[2] = coefficients(center, "center", from.C, x);
  p.activation = activation, p.accumulate = accumulate;
  p.planes = all_planes({&from, &g, &to, &chosen});
  p.x = operand(from), p.pooled = operand(g), p.taps = operand(chosen), p.out = operand(to);
  const int64_t items = from.numel() == 0 ? 0 : p.items(from.N, true), chunks = chunks_of(items);
  const Scratch scratch(chunks, p.scratch_bytes());
  Sums sums(chunks, from.C);
  deal(items, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    Pooling part = p;
    part.sums[0] = sums.of(chunk, 0), part.sums[1] = sums.of(chunk, 1);
    kernels.pool_backward(part, begin, end, scratch.of(chunk));
  });
  return {sums.total(0, from), sums.total(1, from)};
}

}  // namespace

void bn_act_avg_pool(const Tensor& x, const Tensor& scale, const Tensor& shift, double activation,
                     const Sizes& kernel_size, const Sizes& stride, const Sizes& padding, const Tensor& out) {
  pool(x, scale, shift, activation, windows_of(x, kernel_size, stride, padding), out, {});
}

void bn_act_max_pool(const Tensor& x, const Tensor& scale, const Tensor& shift, double activation,
                     const Sizes& kernel_size, const Sizes& stride, const Sizes& padding, const Tensor& out,
                     const Tensor& taps) {
  const WindowSizes windows = windows_of(x, kernel_size, stride, padding);
  check_taps(windows);
  pool(x, scale, shift, activation, windows, out, taps);
}

Tensor bn_act_global_pool(const Tensor& x, const Tensor& scale, const Tensor& shift, double activation) {
  const WindowSizes windows = whole(x);
  Sizes shape(x.dim(), 1);
  shape[0] = x.size(0), shape[1] = x.size(1);
  const Tensor out = torch::stable::new_empty(x, shape);
  pool(x, scale, shift, activation, windows, out, {});
  return out;
}

std::tuple<Tensor, Tensor> bn_act_avg_pool_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                    const Tensor& shift, const Tensor& center, double activation,
                                                    const Sizes& kernel_size, const Sizes& stride, const Sizes& padding,
                                                    const Tensor& out, bool accumulate) {
  const WindowSizes windows = windows_of(x, kernel_size, stride, padding);
  return pool_backward(grad, {}, x, scale, shift, center, activation, windows, out, accumulate);
}

std::tuple<Tensor, Tensor> bn_act_max_pool_backward(const Tensor& grad, const Tensor& taps, const Tensor& x,
                                                    const Tensor& scale, const Tensor& shift, const Tensor& center,
                                                    double activation, const Sizes& kernel_size, const Sizes& stride,
                                                    const Sizes& padding, const Tensor& out, bool accumulate) {
  const WindowSizes windows = windows_of(x, kernel_size, stride, padding);
  check_taps(windows);
  return pool_backward(grad, taps, x, scale, shift, center, activation, windows, out, accumulate);
}

std::tuple<Tensor, Tensor> bn_act_global_pool_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                       const Tensor& shift, const Tensor& center, double activation,
                                                       const Tensor& out, bool accumulate) {
  return pool_backward(grad, {}, x, scale, shift, center, activation, whole(x), out, accumulate);
}

}  // namespace resdense::cpu

STABLE_TORCH_LIBRARY_IMPL(resdense, CPU, m) {
  m.impl("bn_act_avg_pool", TORCH_BOX(&resdense::cpu::bn_act_avg_pool));
  m.impl("bn_act_avg_pool_backward", TORCH_BOX(&resdense::cpu::bn_act_avg_pool_backward));
  m.impl("bn_act_max_pool", TORCH_BOX(&resdense::cpu::bn_act_max_pool));
  m.impl("bn_act_max_pool_backward", TORCH_BOX(&resdense::cpu::bn_act_max_pool_backward));
  m.impl("bn_act_global_pool", TORCH_BOX(&resdense::cpu::bn_act_global_pool));
  m.impl("bn_act_global_pool_backward", TORCH_BOX(&resdense::cpu::bn_act_global_pool_backward));
}
