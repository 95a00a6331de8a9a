#pragma once
// How an elementwise kernel walks its maps: chosen here, on the host.

#include <initializer_list>

#include "elementwise.cuh"
#include "launch.h"

namespace resdense::cuda {

struct WalkPlan {
  Walk walk;
  int64_t positions;  // neighbours of a row that share a channel, as the kernels take it
  bool vectors;       // 16-byte accesses are possible
  unsigned blocks, threads;

 private:
  enum Form { kOneRow, kSamples, kPositions };
  Form form;
  friend WalkPlan plan_walk(std::initializer_list<Map>, bool);
  template <typename T>
  friend Operand<T> operand(const WalkPlan&, const Map&);
};

// `maps` have one shape and dtype, and at least one element; `channels` says that the kernel looks at them.
inline WalkPlan plan_walk(std::initializer_list<Map> maps, bool channels) {
  const Map& m = *maps.begin();
  const auto all = [&](auto holds) { return std::all_of(maps.begin(), maps.end(), holds); };
  const bool last = all([](const Map& a) { return a.channels_last; });
  const bool samples = all([](const Map& a) { return !a.channels_last && a.dense_samples(); });
  const bool dense = all([](const Map& a) { return a.dense(); });

  WalkPlan p{};
  Walk& w = p.walk;
  p.positions = 1;
  if (!channels && dense && (last || samples)) {
    p.form = WalkPlan::kOneRow;
    w.rows = 1, w.inner = m.numel();
    w.rows_per_sample = 1;
  } else if (samples) {
    p.form = WalkPlan::kSamples;
    w.rows = m.N, w.inner = m.C * m.S;
    w.rows_per_sample = m.N;
    p.positions = m.S;
  } else {
    // Any mixture of layouts is right here; what is not channels-last is then read with a stride.
    p.form = WalkPlan::kPositions;
    w.rows = m.rows(), w.inner = m.C;
    w.rows_per_sample = all([](const Map& a) { return a.sn == a.S * a.ss; }) ? w.rows : m.S;
  }

  const int64_t size = m.dtype == ScalarType::Double ? 8 : m.dtype == ScalarType::Float ? 4 : 2;
  const int64_t vec = 16 / size;
  p.vectors = (last || samples) && all([&](const Map& a) {
    const bool rows = p.form == WalkPlan::kOneRow || a.N == 1 || a.sn % vec == 0;
    return aligned(a.data) && rows && (p.form != WalkPlan::kPositions || a.ss % vec == 0);
  });

  constexpr int kThreads = 256;
  const int64_t across = ceil_div(w.inner, p.vectors ? vec : 1);
  w.inner_tiles = ceil_div(across, kThreads);
  w.tx = static_cast<int>(ceil_div(across, w.inner_tiles));
  w.ty = static_cast<int>(std::min<int64_t>(kThreads / w.tx, w.rows));
  p.threads = static_cast<unsigned>(ceil_div(int64_t(w.tx) * w.ty, 32) * 32);
  p.blocks = grid_size(w.inner_tiles * ceil_div(w.rows, int64_t(w.ty) * kRowsPerThread));
  return p;
}

template <typename T>
inline Operand<T> operand(const WalkPlan& p, const Map& m) {
  T* data = static_cast<T*>(m.data);
  switch (p.form) {
    case WalkPlan::kOneRow: return {data, 0, 0, 1};
    case WalkPlan::kSamples: return {data, 0, m.sn, 1};
    default: return {data, m.sn, m.ss, m.sc};
  }
}

}  // namespace resdense::cuda
