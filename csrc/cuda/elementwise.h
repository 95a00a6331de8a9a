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
  bool vectors;  // 16-byte accesses are possible
  int64_t blocks, threads;
};

// So many blocks a multiprocessor keep it busy to the end; only then does a thread take more rows, up to so many, to which it
// applies the coefficients that it has loaded once.
constexpr int64_t kWalkBlocksPerMultiprocessor = 32;
constexpr int64_t kMostRows = 16;

// `maps` have one shape and at least one element; `channels` says that the kernel looks at them.
inline WalkPlan plan_walk(std::initializer_list<Map> maps, bool channels, int multiprocessors) {
  const Map& m = *maps.begin();
  const auto all = [&](auto holds) { return std::all_of(maps.begin(), maps.end(), holds); };
  const bool last = all([](const Map& a) { return a.channels_last; });
  const bool first = all([](const Map& a) { return !a.channels_last && a.dense_samples(); });
  const bool dense = all([](const Map& a) { return a.dense(); });

  WalkPlan p{};
  p.row = !channels && dense && (last || first) ? RowOf::everything : first ? RowOf::sample : RowOf::position;
  int64_t vec = 8;
  for (const Map& a : maps) vec = std::min(vec, vector_length(a.dtype));
  p.vectors = (last || first) && all([&](const Map& a) {
    if (!aligned(a.data)) return false;
    if (p.row == RowOf::everything) return a.numel() % vec == 0;  // a row may be cut off, a vector may not
    return (a.N == 1 || a.sn % vec == 0) && (p.row == RowOf::sample || a.S == 1 || a.ss % vec == 0);
  });
  if (!p.vectors) vec = 1;

  Walk& w = p.walk;
  Share& s = w.share;
  w.positions = 1;
  if (p.row == RowOf::everything) {
    s.channels = std::min(m.numel(), kWalkThreads * vec);
    s.items = s.sample_items = ceil_div(m.numel(), s.channels);
    w.last = m.numel() - (s.items - 1) * s.channels;
  } else if (p.row == RowOf::sample) {
    s.channels = w.last = m.C * m.S;
    s.items = s.sample_items = m.N;
    w.positions = m.S;
  } else {
    // Right for any mixture of layouts; what is not channels-last is then read with a stride.
    s.channels = w.last = m.C;
    s.items = m.rows();
    s.sample_items = all([](const Map& a) { return a.sn == a.S * a.ss; }) ? s.items : m.S;
  }

  const int64_t across = ceil_div(s.channels, vec);
  const int64_t tiles = ceil_div(across, kWalkThreads);
  s.tx = static_cast<int>(ceil_div(across, tiles));
  p.threads = std::min<int64_t>(kWalkThreads, ceil_div(s.tx * s.items, 32) * 32);
  const int64_t step = p.threads / s.tx * kRowsAtOnce;
  const int64_t wanted = ceil_div(multiprocessors * kWalkBlocksPerMultiprocessor, tiles);
  s.chunk_items = std::clamp<int64_t>(s.items / (wanted * step), 1, kMostRows / kRowsAtOnce) * step;
  p.blocks = tiles * ceil_div(s.items, s.chunk_items);
  s.tiles = static_cast<unsigned>(tiles);
  return p;
}

template <typename T>
inline Items<T> items(const WalkPlan& p, const Map& m) {
  T* data = static_cast<T*>(m.data);
  switch (p.row) {
    case RowOf::everything: return {data, 0, p.walk.share.channels, 1};
    case RowOf::sample: return {data, 0, m.sn, 1};
    default: return {data, m.sn, m.ss, m.sc};
  }
}

}  // namespace resdense::cuda
