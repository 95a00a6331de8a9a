#pragma once
// One pass over a tile of a map: the elementwise half of every CPU kernel. See kernels.h.

#include <cstdint>

#include <torch/headeronly/core/ScalarType.h>

namespace resdense::cpu {

// A run of neighbouring positions of one sample: positions [s, s + count) are the tile's [t, t + count).
struct Segment {
  int64_t n, s, t, count;
};

// Where a tile's values lie: in a map (by sample and position) or in a scratch tile (by position within the tile).
struct Operand {
  void* data = nullptr;
  int64_t sn = 0, sc = 0, ss = 0;
  bool scratch = false;

  int64_t offset(const Segment& g) const { return scratch ? g.t * ss : g.n * sn + g.s * ss; }
};

enum class Pass {
  act,              // out = act(scale * x + shift)                    in: x          coef: scale, shift
  deviate,          // out = act(scale * x + shift) - center           in: x          coef: scale, shift, center
  pending,          // out = alpha * dy + beta * z + delta             in: dy, z      coef: alpha, beta, delta
  mask,             // out = dy = g * act'(scale * x + shift)          in: g, x       coef: scale, shift, center
  mask_accumulate,  // out = d + scale * dy                            in: g, x, d    coef: scale, shift, center
  add,              // out = act(scale * z + shift + i)                in: z, i       coef: scale, shift
  add_scaled,       // out = act(scale * z + shift + iscale * i)       in: z, i       coef: scale, shift, iscale
  unmask,           // out = g = grad * act', as y = act(.) tells it   in: grad, y, z      coef: center
  unmask_both,      // the same                                        in: grad, y, z, i   coef: center, icenter
  bias,             // out = x + bias                                  in: x          coef: bias
  sum,              // sums[0] += x                                    in: x
  deviation,        // sums[0] += x - mean, sums[1] += (x - mean)^2    in: x          coef: mean
};
// mask and mask_accumulate also add dy to sums[0] and dy * (x - center) to sums[1]; unmask and unmask_both add g and
// g * (z - center) to these, and the latter g * (i - icenter) to sums[2].

struct Sweep {
  Pass pass;
  torch::headeronly::ScalarType dtype;  // of every operand; coefficients are float64 for float64, else float32
  bool channels_last;                   // of every operand: unit stride along channels, else along positions
  const Segment* segments;
  int64_t segment_count, channels;
  Operand in[4], out;
  const void* coef[3] = {};
  double* sums[3] = {};                 // one value a channel, added to
  double activation = 0;                // see common/activation.h
};

}  // namespace resdense::cpu
