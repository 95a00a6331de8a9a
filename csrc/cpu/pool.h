#pragma once
// Pools of act(scale * x + shift) and their backward over a part of a map. See kernels.h.

#include "../common/windows.h"
#include "sweep.h"

namespace resdense::cpu {

struct Pooling {
  bool maximum;                         // else the average
  bool planes;                          // every map has unit stride along positions; else any strides, best along channels
  torch::headeronly::ScalarType dtype;  // of every map but taps, which are bytes
  WindowSizes windows;
  int64_t channels;
  Operand x, pooled, taps, out;         // forward writes pooled and taps; backward reads them and writes out
  const void* coef[3] = {};             // scale, shift, center
  double activation = 0;                // see common/activation.h
  bool accumulate = false;              // out += scale * dy, else out = dy
  double* sums[2] = {};                 // of dy and of dy * (x - center), added to

  // What is dealt out to threads: with planes a sample's channels, else a sample's lines, of outputs or, backward, of inputs.
  int64_t items(int64_t samples, bool backward) const {
    const int* lines = backward ? windows.in : windows.out;
    return samples * (planes ? channels : int64_t(lines[0]) * lines[1]);
  }
  // Of scratch for a thread: a line of inputs, a line of outputs and one of their places; or a line's ranges.
  int64_t scratch_bytes() const { return 8 * int64_t(windows.in[2]) + 16 * int64_t(windows.out[2]); }
};

}  // namespace resdense::cpu
