#pragma once
// The windows of a pool: which inputs an output has, and which outputs an input.

#include "../common/windows.h"
#include "device.cuh"

namespace resdense::cuda {

// Of one dimension: the places [first, end) and the tap of the window that leads to the first of them; from one place to the
// next the tap moves by `step`.
struct Range {
  int first, end;
  int tap, step;
};

// Neighbours in three dimensions, in a map of these sizes.
struct Box {
  Range d, h, w;
  int height, width;              // of the map
  int kernel_height, kernel_width;

  __device__ int first_tap() const { return (d.tap * kernel_height + h.tap) * kernel_width + w.tap; }

  // f(position, tap) for all places in row-major order, with the place in its sample and the tap in its window.
  template <int UNROLL, typename F>
  __device__ void each(F f) const {
    for (int i = d.first, tap_d = d.tap; i < d.end; ++i, tap_d += d.step) {
      for (int j = h.first, tap_h = h.tap; j < h.end; ++j, tap_h += h.step) {
        const int64_t row = (int64_t(i) * height + j) * width;
        int tap = (tap_d * kernel_height + tap_h) * kernel_width + w.tap;
#pragma unroll UNROLL
        for (int k = w.first; k < w.end; ++k, tap += w.step) f(row + k, tap);
      }
    }
  }
};

// The windows of a pool on the device.
struct Windows : WindowSizes {
  Windows(const WindowSizes& sizes) : WindowSizes(sizes) {}

  __device__ Box inputs_of(int64_t position) const {
    return box(position, out, in, [&](int i, int o) {
      const int64_t start = int64_t(o) * stride[i] - padding[i], end = start + kernel[i];
      const int first = start < 0 ? 0 : static_cast<int>(start);
      return Range{first, end < in[i] ? static_cast<int>(end) : in[i], static_cast<int>(first - start), 1};
    });
  }

  __device__ Box outputs_of(int64_t position) const {
    return box(position, in, out, [&](int i, int at) {
      const unsigned padded = static_cast<unsigned>(at) + padding[i], step = stride[i], size = kernel[i];
      const unsigned first = padded < size ? 0 : (padded - size) / step + 1, last = padded / step;
      const int end = last < static_cast<unsigned>(out[i]) ? static_cast<int>(last) + 1 : out[i];
      return Range{static_cast<int>(first), end, static_cast<int>(padded - first * step), -stride[i]};
    });
  }

 private:
  // The box of range(i, place) in every dimension i, for the position at those places in a map of sizes `of`; it lies in one of
  // sizes `among`.
  template <typename F>
  __device__ Box box(int64_t position, const int (&of)[3], const int (&among)[3], F range) const {
    const int64_t row = position / of[2], plane = row / of[1];
    return {range(0, static_cast<int>(plane)), range(1, static_cast<int>(row - plane * of[1])),
            range(2, static_cast<int>(position - row * of[2])), among[1], among[2], kernel[1], kernel[2]};
  }
};

}  // namespace resdense::cuda
