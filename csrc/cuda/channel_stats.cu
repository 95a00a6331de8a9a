#include "channel_stats.cuh"

#include <bit>
#include <tuple>

#include "launch.h"

namespace resdense::cuda {
namespace {

// Enough blocks to fill the device, and no more: each leaves a partial result behind.
constexpr int64_t kBlocksPerMultiprocessor = 4;

struct Chunks {
  int64_t count, size;
};

// Splits `total` items into chunks, at least `least` long, so that `parallel` blocks a chunk fill the device.
Chunks split(int multiprocessors, int64_t total, int64_t least, int64_t parallel) {
  const int64_t wanted = ceil_div(multiprocessors * kBlocksPerMultiprocessor, parallel);
  const int64_t size = ceil_div(total, std::clamp<int64_t>(wanted, 1, ceil_div(total, least)));
  return {ceil_div(total, size), size};
}

template <typename T>
void run(const Launch& on, const Tensor& x, const Map& m, Tensor& mean, Tensor& m2) {
  using W = wide_t<T>;
  constexpr int VEC = kVector<T>;
  const T* data = static_cast<const T*>(m.data);
  W* const result_mean = static_cast<W*>(mean.mutable_data_ptr());
  W* const result_m2 = static_cast<W*>(m2.mutable_data_ptr());

  bool vectors = aligned(m.data) && (m.N == 1 || m.sn % VEC == 0);
  // A channels-first vector holds values of one channel, so the planes must be whole vectors.
  vectors = vectors && (m.channels_last ? m.S == 1 || m.ss % VEC == 0 : m.S % VEC == 0 && (m.C == 1 || m.sc % VEC == 0));
  const int64_t vec = vectors ? VEC : 1;

  const int64_t across = ceil_div(m.C, vec), items = m.rows() / vec;
  const int tx = static_cast<int>(std::min<int64_t>(32, std::bit_ceil(static_cast<uint64_t>(across))));
  const int64_t channel_tiles = ceil_div(across, tx);
  // A small plane takes a small block: the merge across its warps is then not what it waits for.
  const int64_t plane_threads = std::clamp<int64_t>(ceil_div(items, kStatsUnroll * 32) * 32, 32, kStatsThreads);
  const Chunks chunks =
      m.channels_last ? split(on.multiprocessors(), m.rows(), kStatsThreads / tx * kStatsUnroll, channel_tiles)
                      : split(on.multiprocessors(), items, plane_threads * kStatsUnroll, m.C);

  W *part_mean = result_mean, *part_m2 = result_m2;
  Tensor parts;
  if (chunks.count > 1) {
    parts = torch::stable::new_empty(x, {2, chunks.count, m.C}, stats_dtype(m.dtype));
    part_mean = static_cast<W*>(parts.mutable_data_ptr());
    part_m2 = part_mean + chunks.count * m.C;
  }
  if (m.channels_last) {
    on.run(vectors ? channel_stats_rows_kernel<T, VEC> : channel_stats_rows_kernel<T, 1>, chunks.count * channel_tiles,
           kStatsThreads, data, m.C, m.rows(), m.uniform_rows() ? m.rows() : m.S, m.sn, m.ss, chunks.size, channel_tiles,
           tx, part_mean, part_m2);
  } else {
    on.run(vectors ? channel_stats_planes_kernel<T, VEC> : channel_stats_planes_kernel<T, 1>, chunks.count * m.C,
           plane_threads, data, m.C, items, m.S / vec, m.sn, m.sc, chunks.size, part_mean, part_m2);
  }
  if (chunks.count > 1) {
    on.run(channel_stats_finish_kernel<W>, ceil_div(m.C, kFinishChannels), kStatsThreads, part_mean, part_m2, m.C,
           m.rows(), chunks.size * (m.channels_last ? 1 : vec), chunks.count, result_mean, result_m2);
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

RESDENSE_CUDA_OPERATORS(m) { m.impl("channel_stats", TORCH_BOX(&channel_stats)); }

}  // namespace resdense::cuda
