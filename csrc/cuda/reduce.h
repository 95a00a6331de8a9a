#pragma once
// How a reduction over the positions of every channel shares its maps out, and its two launches: chosen here, on the host.

#include <bit>
#include <initializer_list>
#include <tuple>

#include "launch.h"
#include "reduce.cuh"

namespace resdense::cuda {

// The blocks that a multiprocessor has at once. There are as many as fill the device, or, where a thread would have too many
// items, twice as many and so on: each leaves a partial result behind, and the last ones should not be alone.
constexpr int64_t kBlocksPerMultiprocessor = 2;
// A thread takes a multiple of so many items, as it loads up to that many at once, and at most so many: a longer chain of float32
// additions loses digits.
constexpr int64_t kLeastItems = 8;
constexpr int64_t kMostItems = 64;

struct ReducePlan {
  Share share;
  bool rows, vectors;
  int64_t item_positions;  // 1, or the length of a vector that lies along the positions
  int64_t chunks, blocks, threads;
};

// `maps` have one shape and dtype, and at least one element. `vectors` says that whatever else is read allows them.
inline ReducePlan plan_reduce(std::initializer_list<Map> maps, int multiprocessors, bool vectors = true) {
  const Map& m = *maps.begin();
  const auto all = [&](auto holds) { return std::all_of(maps.begin(), maps.end(), holds); };
  const bool last = all([](const Map& a) { return a.channels_last; });
  const bool first = all([](const Map& a) { return !a.channels_last; });
  const int64_t length = vector_length(m.dtype);

  ReducePlan p{};
  Share& s = p.share;
  p.rows = !first;
  p.vectors = vectors && (last || first) && all([&](const Map& a) {
    if (!aligned(a.data) || (a.N > 1 && a.sn % length != 0)) return false;
    // A vector of a plane holds values of one channel, so the planes must be whole vectors.
    return last ? a.S == 1 || a.ss % length == 0 : a.S % length == 0 && (a.C == 1 || a.sc % length == 0);
  });
  const int64_t vec = p.vectors ? length : 1;
  p.item_positions = p.rows ? 1 : vec;

  s.channels = m.C;
  s.items = m.rows() / p.item_positions;
  const bool uniform = p.rows && all([](const Map& a) { return a.sn == a.S * a.ss; });
  s.sample_items = uniform ? s.items : m.S / p.item_positions;

  const auto power = [](int64_t n) { return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n))); };
  const int64_t across = p.rows ? ceil_div(m.C, vec) : m.C;
  s.tx = p.rows ? static_cast<int>(std::min<int64_t>(32, power(across))) : 1;
  s.tiles = static_cast<unsigned>(ceil_div(across, s.tx));
  // A small plane takes a small block: the merge across its threads is then not what it waits for.
  p.threads = std::clamp<int64_t>(power(ceil_div(s.items, kLeastItems)) * s.tx, 32, kReduceThreads);

  const int64_t step = p.threads / s.tx * kLeastItems;
  const int64_t wanted = ceil_div(multiprocessors * kBlocksPerMultiprocessor, s.tiles);
  const int64_t rounds = ceil_div(s.items, wanted * step * (kMostItems / kLeastItems));
  s.chunk_items = ceil_div(s.items, wanted * rounds * step) * step;
  p.chunks = ceil_div(s.items, s.chunk_items);
  p.blocks = p.chunks * s.tiles;
  return p;
}

template <typename T>
inline Items<T> items(const ReducePlan& p, const Map& m) {
  return {static_cast<T*>(m.data), m.sn, p.rows ? m.ss : p.item_positions, m.sc};
}

// The two vectors of sums over a map: zero where it is empty, else uninitialised.
inline std::tuple<Tensor, Tensor> new_sums(const Tensor& x, const Map& m) {
  const Tensor first = empty_vector(m.C, stats_dtype(m.dtype), x);
  const Tensor second = empty_vector(m.C, stats_dtype(m.dtype), x);
  if (m.numel() == 0) {
    torch::stable::fill_(first, 0.0);
    torch::stable::fill_(second, 0.0);
  }
  return {first, second};
}

// The blocks of a second stage.
inline int64_t finish_blocks(int64_t channels) { return ceil_div(channels, kFinishChannels); }

// Both stages of a reduction to accumulators A of one channel: start(first, second) launches the first one, which leaves its
// results there, for finish(channel, all) on the device, that of `like`.
template <typename A, typename Start, typename Finish>
inline void reduce(const Launch& on, const ReducePlan& p, const Tensor& like, Start start, Finish finish) {
  using W = typename A::Value;
  const int64_t channels = p.share.channels;
  const Tensor parts = torch::stable::new_empty(like, {2, p.chunks, channels}, stats_dtype(like.scalar_type()));
  W* const first = static_cast<W*>(parts.mutable_data_ptr());
  W* const second = first + p.chunks * channels;
  start(first, second);
  const Chunks<A> chunks{first, second, channels, p.share.items * p.item_positions, p.share.chunk_items * p.item_positions, p.chunks};
  on.run(reduce_finish_kernel<A, Finish>, finish_blocks(channels), kReduceThreads, chunks, finish);
}

// The same to two vectors, which the first stage leaves itself where there is one chunk.
template <typename A, typename F>
inline void reduce(const Launch& on, const ReducePlan& p, const Tensor& first, const Tensor& second, F start) {
  using W = typename A::Value;
  W* const to_first = static_cast<W*>(first.mutable_data_ptr());
  W* const to_second = static_cast<W*>(second.mutable_data_ptr());
  if (p.chunks == 1) return start(to_first, to_second);
  reduce<A>(on, p, first, start, Leave<W>{to_first, to_second});
}

}  // namespace resdense::cuda
