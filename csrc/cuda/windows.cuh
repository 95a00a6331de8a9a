#pragma once
// The windows of a pool: which inputs an output has, and which outputs an input.

#include <bit>

#include "../common/windows.h"
#include "device.cuh"

namespace resdense::cuda {

// Of one dimension: the places [first, end) and the tap of the window that leads to the first of them; from one place to the
// next the tap moves by `step`.
struct Range {
  int first, end;
  int tap, step;
};

// COUNT places of the other map, whose loads can all be under way at once, and for every one the tap in its window that leads
// to each of INPUTS inputs, -1 where none does.
template <int COUNT, int INPUTS>
struct Places {
  static constexpr int kCount = COUNT;
  int64_t position[COUNT];
  int tap[COUNT][INPUTS];

  __device__ int first_tap() const { return tap[0][0]; }

  template <int, typename F>
  __device__ void each(F f) const {
    f(*this);
  }
};

// Where an item is: at the position s of sample n.
struct Position {
  int64_t n, s;
};

// Neighbours in three dimensions, in a map of these sizes.
struct Box {
  Range d, h, w;
  int height, width;              // of the map
  int kernel_height, kernel_width;

  __device__ int first_tap() const { return (d.tap * kernel_height + h.tap) * kernel_width + w.tap; }

  // f(places) for all of them in row-major order, one by one.
  template <int UNROLL, typename F>
  __device__ void each(F f) const {
    for (int i = d.first, tap_d = d.tap; i < d.end; ++i, tap_d += d.step) {
      for (int j = h.first, tap_h = h.tap; j < h.end; ++j, tap_h += h.step) {
        const int64_t row = (int64_t(i) * height + j) * width;
        int tap = (tap_d * kernel_height + tap_h) * kernel_width + w.tap;
#pragma unroll UNROLL
        for (int k = w.first; k < w.end; ++k, tap += w.step) f(Places<1, 1>{{row + k}, {{tap}}});
      }
    }
  }
};

// Any windows. A backward's item is one input.
struct Windows : WindowSizes {
  using Index = int64_t;
  static constexpr bool kKnown = false;
  static constexpr int kInputs = 1;

  explicit Windows(const WindowSizes& sizes) : WindowSizes(sizes) {}

  __device__ Position at(int64_t item, int64_t sample_items) const {
    const int64_t n = item / sample_items;
    return {n, item - n * sample_items};
  }

  __device__ int64_t input(const Position& at, int) const { return at.s; }

  __device__ Box inputs_of(const Position& at) const {
    return box(at.s, out, in, [&](int i, int o) {
      const int64_t start = int64_t(o) * stride[i] - padding[i], end = start + kernel[i];
      const int first = start < 0 ? 0 : static_cast<int>(start);
      return Range{first, end < in[i] ? static_cast<int>(end) : in[i], static_cast<int>(first - start), 1};
    });
  }

  __device__ Box outputs_of(const Position& at) const {
    return box(at.s, in, out, [&](int i, int at) {
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

// So many items that those of any known windows, and their inputs, are numbered in 32 bits: 64 bits would take the registers of
// loads.
constexpr int64_t kMostKnownItems = int64_t(1) << 28;

// The one window that holds everything, for a backward.
struct WholeWindow {
  using Index = int;
  static constexpr bool kKnown = true;
  static constexpr int kInputs = 1;
  int64_t taps;
  Divisor by_size;

  explicit WholeWindow(const WindowSizes& sizes) : taps(sizes.taps), by_size(static_cast<int>(sizes.taps)) {}

  static bool fit(const WindowSizes& sizes, int64_t samples) { return sizes.taps <= kMostKnownItems / samples; }

  __device__ Position at(int item, int64_t sample_items) const {
    const int n = by_size.quotient(item);
    return {n, item - n * static_cast<int>(sample_items)};
  }

  __device__ int64_t input(const Position& at, int) const { return at.s; }
  __device__ Places<1, 1> outputs_of(const Position&) const { return {{0}, {{0}}}; }
};

// Windows of KERNEL x KERNEL, STRIDE apart, on a map whose sizes are STRIDE times those of the outputs: its cells of
// STRIDE x STRIDE inputs are a backward's items. Window and cell i begin at the inputs i * STRIDE - PADDING and i * STRIDE, so no
// window ends beyond the map, and none before a cell reaches into it.
template <int KERNEL, int STRIDE, int PADDING>
struct FixedWindows {
  static_assert(KERNEL == STRIDE + PADDING && PADDING <= 1);
  using Index = int;
  static constexpr bool kKnown = true;
  static constexpr int kInputs = STRIDE * STRIDE;
  static constexpr int kReach = (STRIDE + PADDING - 1) / STRIDE + 1;  // windows, in each dimension, that a cell lies in
  static constexpr int64_t taps = KERNEL * KERNEL;
  int height, width;  // of the outputs
  Divisor by_height, by_width;

  explicit FixedWindows(const WindowSizes& sizes)
      : height(sizes.out[1]), width(sizes.out[2]), by_height(height), by_width(width) {}

  static bool fit(const WindowSizes& sizes, int64_t samples) {
    const auto along = [&](int i) {
      return sizes.kernel[i] == KERNEL && sizes.stride[i] == STRIDE && sizes.padding[i] == PADDING &&
             sizes.in[i] == STRIDE * int64_t(sizes.out[i]);
    };
    return sizes.in[0] == 1 && sizes.kernel[0] == 1 && along(1) && along(2) &&
           int64_t(sizes.out[1]) * sizes.out[2] <= kMostKnownItems / samples;
  }

  struct Cell {
    int n, s, row, column;
  };

  __device__ Cell at(int item, int64_t) const {
    const int all_rows = by_width.quotient(item), n = by_height.quotient(all_rows), row = all_rows - n * height;
    return {n, item - n * height * width, row, item - all_rows * width};
  }

  __device__ Places<KERNEL * KERNEL, 1> inputs_of(const Cell& at) const {
    Places<KERNEL * KERNEL, 1> places;
#pragma unroll
    for (int i = 0; i < KERNEL * KERNEL; ++i) {
      // In place of padding comes the first row or column once more, with its own tap: what a maximum can see twice.
      const int down = i / KERNEL - PADDING, right = i % KERNEL - PADDING;
      const int h = down < 0 && at.row == 0 ? 0 : down, w = right < 0 && at.column == 0 ? 0 : right;
      places.position[i] = (at.row * STRIDE + h) * (STRIDE * width) + at.column * STRIDE + w;
      places.tap[i][0] = (h + PADDING) * KERNEL + w + PADDING;
    }
    return places;
  }

  __device__ int64_t input(const Cell& at, int i) const {
    return (at.row * STRIDE + i / STRIDE) * (STRIDE * width) + at.column * STRIDE + i % STRIDE;
  }

  __device__ Places<kReach * kReach, kInputs> outputs_of(const Cell& at) const {
    Places<kReach * kReach, kInputs> places;
#pragma unroll
    for (int o = 0; o < kReach * kReach; ++o) {
      const int down = o / kReach, right = o % kReach;
      const bool exists = (down == 0 || at.row + down < height) && (right == 0 || at.column + right < width);
      places.position[o] = exists ? at.s + down * width + right : at.s;
#pragma unroll
      for (int i = 0; i < kInputs; ++i) {
        const int h = i / STRIDE + PADDING - down * STRIDE, w = i % STRIDE + PADDING - right * STRIDE;
        places.tap[o][i] = exists && h >= 0 && w >= 0 ? h * KERNEL + w : -1;
      }
    }
    return places;
  }
};

}  // namespace resdense::cuda
