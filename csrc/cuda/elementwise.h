#pragma once
// How an elementwise kernel walks its maps: chosen here, on the host.

#include <initializer_list>

#include "elementwise.cuh"
#include "launch.h"

namespace resdense::cuda {

enum class RowOf { everything, sample, position };

struct WalkPlan {
  Walk walk;
  RowOf row;
  int64_t positions;  // neighbours of a row that share a channel, as the kernels take it
  bool vectors;       // 16-byte accesses are possible
  int64_t blocks, threads;
};

// `maps` have one shape and at least one element; `channels` says that the kernel looks at them.
inline WalkPlan plan_walk(std::initializer_list<Map> maps, bool channels) {
  const Map& m = *maps.begin();
  const auto all = [&](auto holds) { return std::all_of(maps.begin(), maps.end(), holds); };
  const bool last = all([](const Map& a) { return a.channels_last; });
  const bool first = all([](const Map& a) { return !a.channels_last && a.dense_samples(); });
  const bool dense = all([](const Map& a) { return a.dense(); });

  WalkPlan p{};
  Walk& w = p.walk;
  p.positions = 1;
  if (!channels && dense && (last || first)) {
    p.row = RowOf::everything;
    w.rows = w.rows_per_sample = 1;
    w.inner = m.numel();
  } else if (first) {
    p.row = RowOf::sample;
    w.rows = w.rows_per_sample = m.N;
    w.inner = m.C * m.S;
    p.positions = m.S;
  } else {
    // Right for any mixture of layouts; what is not channels-last is then read with a stride.
    p.row = RowOf::position;
    w.rows = m.rows();
    w.rows_per_sample = all([](const Map& a) { return a.sn == a.S * a.ss; }) ? w.rows : m.S;
    w.inner = m.C;
  }

  int64_t vec = 8;
  for (const Map& a : maps) vec = std::min(vec, vector_length(a.dtype));
  p.vectors = (last || first) && all([&](const Map& a) {
    if (!aligned(a.data)) return false;
    if (p.row == RowOf::everything) return true;
    return (a.N == 1 || a.sn % vec == 0) && (p.row == RowOf::sample || a.S == 1 || a.ss % vec == 0);
  });

  constexpr int64_t kThreads = 256;
  const int64_t across = ceil_div(w.inner, p.vectors ? vec : 1);
  w.inner_tiles = ceil_div(across, kThreads);
  w.tx = static_cast<int>(ceil_div(across, w.inner_tiles));
  w.ty = static_cast<int>(std::min<int64_t>(kThreads / w.tx, w.rows));
  p.threads = ceil_div(w.tx * w.ty, 32) * 32;
  p.blocks = w.inner_tiles * ceil_div(w.rows, int64_t(w.ty) * kRowsPerThread);
  return p;
}

template <typename T>
inline Operand<T> operand(const WalkPlan& p, const Map& m) {
  T* data = static_cast<T*>(m.data);
  switch (p.row) {
    case RowOf::everything: return {data, 0, 0, 1};
    case RowOf::sample: return {data, 0, m.sn, 1};
    default: return {data, m.sn, m.ss, m.sc};
  }
}

}  // namespace resdense::cuda
