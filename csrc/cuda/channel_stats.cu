#include "channel_stats.cuh"

#include <bit>
#include <tuple>

#include "launch.h"

namespace resdense::cuda {
namespace {

// Enough blocks to fill the device, and no more: each leaves a partial result behind.
constexpr int64_t kBlocksPerMultiprocessor = 4;

struct Stats {
  int64_t chunks, per_chunk;
  unsigned blocks;
  void *mean, *m2;  // of the chunks, or the result where there is one chunk
};

// Splits `total` items into chunks, at least `least` long, so that `parallel` blocks a chunk fill the device.
void split(const Launch& on, int64_t total, int64_t least, int64_t parallel, Stats& s) {
  const int64_t wanted = ceil_div(on.multiprocessors() * kBlocksPerMultiprocessor, parallel);
  s.chunks = std::clamp<int64_t>(wanted, 1, ceil_div(total, least));
  s.per_chunk = ceil_div(total, s.chunks);
  s.chunks = ceil_div(total, s.per_chunk);
  s.blocks = grid_size(s.chunks * parallel);
}

template <typename T>
void run(const Launch& on, const Tensor& x, const Map& m, Tensor& mean, Tensor& m2) {
  using W = wide_t<T>;
  const T* data = static_cast<const T*>(m.data);
  const bool unit = m.channels_last ? m.ss % kVector<T> == 0 || m.rows() == 1 : m.sc % kVector<T> == 0 || m.C == 1;
  // Channels-first rows must hold whole vectors: a vector has the values of one channel.
  const bool vectors = aligned(m.data) && unit && (m.sn % kVector<T> == 0 || m.N == 1) &&
                       (m.channels_last || m.S % kVector<T> == 0);
  const int64_t vec = vectors ? kVector<T> : 1;

  Stats s{};
  Tensor parts;
  const auto results = [&] {
    W *to_mean = static_cast<W*>(mean.mutable_data_ptr()), *to_m2 = static_cast<W*>(m2.mutable_data_ptr());
    if (s.chunks > 1) {
      parts = torch::stable::new_empty(x, {2, s.chunks, m.C}, stats_dtype(m.dtype));
      to_mean = static_cast<W*>(parts.mutable_data_ptr());
      to_m2 = to_mean + s.chunks * m.C;
    }
    return std::pair{to_mean, to_m2};
  };

  if (m.channels_last) {
    const int64_t across = ceil_div(m.C, vec);
    const int tx = static_cast<int>(std::min<int64_t>(32, std::bit_ceil(static_cast<uint64_t>(across))));
    const int64_t tiles = ceil_div(across, tx);
    split(on, m.rows(), kStatsThreads / tx * kStatsUnroll, tiles, s);
    const auto [to_mean, to_m2] = results();
    const int64_t positions = m.uniform_rows() ? m.rows() : m.S;
    auto* kernel = vectors ? channel_stats_rows_kernel<T, kVector<T>> : channel_stats_rows_kernel<T, 1>;
    kernel<<<s.blocks, kStatsThreads, 0, on.stream()>>>(data, m.C, m.rows(), positions, m.sn, m.ss, s.per_chunk, tiles,
                                                       tx, to_mean, to_m2);
  } else {
    const int64_t items = m.rows() / vec;
    // A small plane takes a small block: the merge across its warps is then not what it waits for.
    const int threads = static_cast<int>(std::clamp<int64_t>(ceil_div(items, kStatsUnroll * 32) * 32, 32, kStatsThreads));
    split(on, items, int64_t(threads) * kStatsUnroll, m.C, s);
    const auto [to_mean, to_m2] = results();
    auto* kernel = vectors ? channel_stats_planes_kernel<T, kVector<T>> : channel_stats_planes_kernel<T, 1>;
    kernel<<<s.blocks, threads, 0, on.stream()>>>(data, m.C, items, m.S / vec, m.sn, m.sc, s.per_chunk, to_mean, to_m2);
    s.per_chunk *= vec;
  }
  on.check_launch();
  if (s.chunks > 1) {
    const W* part = static_cast<const W*>(parts.const_data_ptr());
    channel_stats_finish_kernel<W><<<grid_size(ceil_div(m.C, kFinishChannels)), kStatsThreads, 0, on.stream()>>>(
        part, part + s.chunks * m.C, m.C, m.rows(), s.per_chunk, s.chunks, static_cast<W*>(mean.mutable_data_ptr()),
        static_cast<W*>(m2.mutable_data_ptr()));
    on.check_launch();
  }
}

std::tuple<Tensor, Tensor> channel_stats(const Tensor& x) {
  const Map m = map_of(x, "x");
  Tensor mean = torch::stable::new_empty(x, {m.C}, stats_dtype(m.dtype));
  Tensor m2 = torch::stable::new_empty(x, {m.C}, stats_dtype(m.dtype));
  if (m.numel() == 0) {
    // The mean of nothing is not a number, as in torch.
    torch::stable::fill_(mean, std::numeric_limits<double>::quiet_NaN());
    torch::stable::fill_(m2, 0.0);
    return {mean, m2};
  }
  const Launch on(x);
  dispatch(m.dtype, [&](auto zero) { run<decltype(zero)>(on, x, m, mean, m2); });
  return {mean, m2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resdense, CUDA, m) { m.impl("channel_stats", TORCH_BOX(&channel_stats)); }

}  // namespace resdense::cuda
