#pragma once
// A 3x3 convolution of act(scale * x + shift), channels-last, whose tile is activated once in shared memory.
//
// The warps of a block are a few teams, which share the weights in shared memory and nothing else: each takes tiles of the stack
// of rows for itself, and the channels of a tile in chunks. While one chunk is multiplied the next is on its way; a thread then
// activates in place the pieces that it has copied itself, the team meets at its own barrier, and `ldmatrix` reads the rows of
// a tap as those of the first tap, shifted. So there is one barrier a chunk, and the teams are at different points.

#include <bit>

#include "conv.cuh"
#include "matrix.cuh"
#include "stack.cuh"

namespace resdense::cuda {

constexpr int kConvChunk = 32;  // channels

// For 128 -> 32 channels a large tile (256 positions) costs, in clocks of a multiprocessor: 4,400 for its bytes; 4,500 for its
// products at the rate of wgmma, some 7,500 at that of mma.sync; 6,900 for reading its fragments, of which a warp, with its
// 64 x 32 products, uses each 4 times; 2,000 for the activation of its halo, and 1,000 to finish. The weights, 72 KiB, stay in
// shared memory for all tiles of a block where there is room for them (two chunks of a halo take 40 KiB a team); else a team
// copies them anew for every tile, a chunk ahead. Small tiles (64 positions), whose fragments are used half as often, are for maps
// of which large ones would leave most of the device's warps idle.
template <int N16, bool LARGE>
struct ConvTile {
  static constexpr int kOutputs = 16 * N16;
  static constexpr int kM16 = !LARGE ? 1 : N16 <= 2 ? 4 : 2;  // a warp's products: 16 kM16 positions by kOutputs channels
  static constexpr int kPositions = LARGE ? 256 : 64;
  static constexpr int kThreads = kPositions / (16 * kM16) * 32;  // of a team
  static constexpr int kTeams = !LARGE ? 4 : N16 <= 2 ? 3 : 1;    // of a block, at most
  static constexpr int kHalo = LARGE ? 320 : 128;                 // positions of the tile and around it, at most
  static constexpr int kWeights = kConvTaps * kOutputs * kConvChunk;  // of a chunk

  // Shared memory: weights, of all chunks or of two a team; scale and shift; the halos of two chunks, and where those of two
  // tiles come from.
  static constexpr int64_t bytes(int64_t chunks, int64_t teams, bool all_weights) {
    const int64_t team = 2 * kHalo * (kConvChunk * 2 + 8);
    return (all_weights ? chunks : 2 * teams) * kWeights * 2 + chunks * kConvChunk * 8 + teams * team;
  }
};

template <typename T>
struct Conv3x3 {
  const T* x;
  const float *scale, *shift;
  const T* weight;  // [outputs][3][3][channels]
  T* out;
  float slope;
  int64_t x_sn, x_ss, out_sn, out_ss;  // strides of sample and position
  int channels, outputs;
  Stack stack;
  bool all_weights;                    // all chunks of the weights have a place in shared memory
  ConvStats stats;
};

// Shared memory holds rows of kConvChunk channels in 16-byte pieces. The eight rows that ldmatrix reads at once have
// consecutive `key`s; their pieces are permuted so that all of them lie in different banks.
__device__ inline int swizzled(int row, int key, int piece) { return row * 4 + (piece ^ ((key >> 1) & 3)); }

template <typename T, int N16, bool LARGE>
__global__ void __launch_bounds__(ConvTile<N16, LARGE>::kThreads * ConvTile<N16, LARGE>::kTeams)
    bn_act_conv3x3_fwd_kernel(Conv3x3<T> p) {
  start_kernel();
  using Tile = ConvTile<N16, LARGE>;
  using Piece = Vector<T, 8>;
  constexpr int kPieces = kConvChunk / 8;
  constexpr int kRowsAtOnce = Tile::kThreads / kPieces;
  constexpr int kLoads = Tile::kHalo / kRowsAtOnce;
  static_assert(kPieces == 4 && Tile::kHalo % kRowsAtOnce == 0 && kLoads <= 16);

  const int team = threadIdx.x / Tile::kThreads, teams = blockDim.x / Tile::kThreads;
  const int thread = threadIdx.x % Tile::kThreads, lane = thread % 32, warp = thread / 32;
  const int chunks = (p.channels + kConvChunk - 1) / kConvChunk;
  const Stack& stack = p.stack;
  const int pitch = stack.pitch(), halo = stack.halo();

  Piece* const s_weight = reinterpret_cast<Piece*>(dynamic_shared());
  float* const s_scale = reinterpret_cast<float*>(s_weight + (p.all_weights ? chunks : 2 * teams) * (Tile::kWeights / 8));
  float* const s_shift = s_scale + chunks * kConvChunk;
  Piece* const s_halos = reinterpret_cast<Piece*>(s_shift + chunks * kConvChunk);
  const auto halo_of = [&](int slot) { return s_halos + (team * 2 + slot) * (Tile::kHalo * kPieces); };
  const auto weight_of = [&](int chunk, int slot) {
    return s_weight + (p.all_weights ? chunk : team * 2 + slot) * (Tile::kWeights / 8);
  };
  int64_t* const s_offsets = reinterpret_cast<int64_t*>(s_halos + teams * 2 * (Tile::kHalo * kPieces)) + team * 2 * Tile::kHalo;

  // A thread copies the same piece of every kRowsAtOnce-th position of the halo.
  const int piece = thread % kPieces, first = thread / kPieces;
  uint32_t keys = 0;
  for (int i = 0; i < kLoads; ++i) {
    const int row = first + i * kRowsAtOnce;
    keys |= (((row >> 1) - stack.by_pitch.quotient(row)) & 3u) << 2 * i;
  }
  const auto mine = [&](int i) { return swizzled(first + i * kRowsAtOnce, keys >> 2 * i << 1, piece); };

  // The positions of the tile that this lane brings to ldmatrix, as rows of the halo.
  int positions[Tile::kM16];
#pragma unroll
  for (int m = 0; m < Tile::kM16; ++m) {
    const int q = (warp * Tile::kM16 + m) * 16 + lane % 16;
    const int row = stack.by_columns.quotient(q);
    positions[m] = row < stack.tile_rows ? q + 2 * row : 0;
  }

  // Those of a tile and of the next one have a place each: the copies of the one may still be asked for.
  const auto place_halo = [&](int tile, int place) {
    const int top = stack.by_strips.quotient(tile), left = tile - top * stack.strips;
    for (int i = thread; i < Tile::kHalo; i += Tile::kThreads) {
      const int row = stack.by_pitch.quotient(i), column = i - row * pitch;
      const int64_t offset =
          stack.offset(top * stack.tile_rows + row - 1, left * stack.tile_columns + column - 1, p.x_sn, p.x_ss);
      s_offsets[place * Tile::kHalo + i] = i < halo ? offset : -1;
    }
  };

  uint32_t inside = 0;  // a bit for each of the pieces that is not padding
  const auto copy_halo = [&](int chunk, int place, Piece* to) {
    const int channel = chunk * kConvChunk + piece * 8;
    inside = 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t offset = s_offsets[place * Tile::kHalo + first + i * kRowsAtOnce];
      const bool exists = offset >= 0 && channel < p.channels;
      inside |= uint32_t(exists) << i;
      copy_16_bytes(to + mine(i), exists ? p.x + offset + channel : p.x, exists);
    }
  };

  const auto activate_halo = [&](int chunk, Piece* halo, float slope) {
    const int channel = chunk * kConvChunk + piece * 8;
    Vector<float, 2> scale[4], shift[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      scale[k] = load<float, 2>(s_scale + channel + 2 * k);
      shift[k] = load<float, 2>(s_shift + channel + 2 * k);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (!(inside >> i & 1)) continue;
      auto words = std::bit_cast<Vector<uint32_t, 4>>(halo[mine(i)]);
#pragma unroll
      for (int k = 0; k < 4; ++k) words.v[k] = activate_pair<T>(words.v[k], scale[k], shift[k], slope);
      halo[mine(i)] = std::bit_cast<Piece>(words);
    }
  };

  // By so many threads, each of which takes every so many pieces.
  const auto copy_weights = [&](int chunk, Piece* to, int from_row, int rows_at_once) {
    const int channel = chunk * kConvChunk + piece * 8;
    for (int row = from_row; row < kConvTaps * Tile::kOutputs; row += rows_at_once) {
      const int tap = row / Tile::kOutputs, output = row - tap * Tile::kOutputs;
      const bool exists = output < p.outputs && channel < p.channels;
      const int64_t from = exists ? (int64_t(output) * kConvTaps + tap) * p.channels + channel : 0;
      copy_16_bytes(to + swizzled(row, row, piece), p.weight + from, exists);
    }
  };

  float sums[Tile::kM16][2 * N16][4];
  const auto multiply = [&](const Piece* halo, const Piece* weight) {
    const int output = lane % 8 + lane / 16 * 8;
#pragma unroll 1
    for (int dy = 0; dy < 3; ++dy) {
#pragma unroll
      for (int dx = 0; dx < 3; ++dx) {
        const int key = lane + dy * stack.tile_columns + dx;
#pragma unroll
        for (int k = 0; k < kPieces; k += 2) {
          uint32_t b[N16][4];
#pragma unroll
          for (int n = 0; n < N16; ++n) {
            const int row = ((dy * 3 + dx) * N16 + n) * 16 + output;
            load_matrices(b[n], weight + swizzled(row, output, k + lane / 8 % 2));
          }
#pragma unroll
          for (int m = 0; m < Tile::kM16; ++m) {
            uint32_t a[4];
            load_matrices(a, halo + swizzled(positions[m] + dy * pitch + dx, key, k + lane / 16));
#pragma unroll
            for (int n = 0; n < N16; ++n) {
              multiply_add(sums[m][2 * n], a, b[n][0], b[n][1], T{});
              multiply_add(sums[m][2 * n + 1], a, b[n][2], b[n][3], T{});
            }
          }
        }
      }
    }
  };

  // Rounds the sums, writes them, and merges what was written into the moments of this lane's channels.
  Moments<float, 4 * N16> moments;
  const auto finish = [&](int tile) {
    const int top = stack.by_strips.quotient(tile), left = tile - top * stack.strips;
    uint32_t written = 0;
#pragma unroll
    for (int i = 0; i < 2 * Tile::kM16; ++i) {
      const int m = i / 2, half = i % 2 * 2;
      const int q = (warp * Tile::kM16 + m) * 16 + half * 4 + lane / 4;
      const int row = stack.by_columns.quotient(q), column = q - row * stack.tile_columns;
      const int64_t offset =
          row < stack.tile_rows ? stack.offset(top * stack.tile_rows + row, left * stack.tile_columns + column, p.out_sn, p.out_ss) : -1;
      if (offset >= 0) written |= 1u << i;
#pragma unroll
      for (int n = 0; n < N16; ++n) {
        uint32_t pairs[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float(&sum)[4] = sums[m][2 * n + j];
          pairs[j] = round_products<T>(sum, i);
          const auto written_pair = widen_pair(pairs[j], T{});
          sum[half] = written_pair.v[0], sum[half + 1] = written_pair.v[1];
        }
        const auto four = swap_pairs(pairs[0], pairs[1]);
        const int channel = n * 16 + written_channel();
        if (offset >= 0 && channel < p.outputs) store(reinterpret_cast<uint32_t*>(p.out + offset + channel), four);
      }
    }
    if (p.stats.parts == nullptr) return;
    const float count = static_cast<float>(std::popcount(written)), inverse = 1 / count;
    moments.merge(count, [&](int k, float& mean, float& m2) {
      mean = 0;
#pragma unroll
      for (int i = 0; i < 2 * Tile::kM16; ++i)
        if (written >> i & 1) mean += sums[i / 2][k / 2][i % 2 * 2 + k % 2];
      mean *= inverse;
      m2 = 0;
#pragma unroll
      for (int i = 0; i < 2 * Tile::kM16; ++i) {
        if (written >> i & 1) {
          const float d = sums[i / 2][k / 2][i % 2 * 2 + k % 2] - mean;
          m2 += d * d;
        }
      }
    });
  };

  for (int channel = threadIdx.x; channel < chunks * kConvChunk; channel += blockDim.x) {
    s_scale[channel] = channel < p.channels ? p.scale[channel] : 0;
    s_shift[channel] = channel < p.channels ? p.shift[channel] : 0;
  }
  // The teams of different blocks first.
  int tile = blockIdx.x + team * gridDim.x;
  if (tile < stack.tiles) place_halo(tile, 0);
  __syncthreads();
  const auto copy = [&](int chunk, int place, int slot) {
    copy_halo(chunk, place, halo_of(slot));
    if (!p.all_weights) copy_weights(chunk, weight_of(chunk, slot), first, kRowsAtOnce);
  };
  if (tile < stack.tiles) copy(0, 0, 0);
  for (int chunk = 0; p.all_weights && chunk < chunks; ++chunk)
    copy_weights(chunk, weight_of(chunk, 0), threadIdx.x / kPieces, blockDim.x / kPieces);
  finish_copies();
  __syncthreads();

  for (int chunk = 0, place = 0, slot = 0; tile < stack.tiles;) {
    finish_copies();
    // With a slope that the compiler knows the ReLU is part of the rounding.
    if (p.slope == 0)
      activate_halo(chunk, halo_of(slot), 0);
    else
      activate_halo(chunk, halo_of(slot), p.slope);
    const bool last = chunk + 1 == chunks;
    const int next_tile = last ? tile + gridDim.x * teams : tile, next_chunk = last ? 0 : chunk + 1;
    const int next_place = last ? place ^ 1 : place;
    if (last && next_tile < stack.tiles) place_halo(next_tile, next_place);
    // What the team has activated is there, and all are done with the chunk before, whose place is free.
    sync_threads(1 + team, Tile::kThreads);
    if (next_tile < stack.tiles) copy(next_chunk, next_place, slot ^ 1);

    if (chunk == 0) {
#pragma unroll
      for (auto& of_positions : sums)
#pragma unroll
        for (auto& of_outputs : of_positions)
#pragma unroll
          for (float& sum : of_outputs) sum = 0;
    }
    multiply(halo_of(slot), weight_of(chunk, slot));
    if (last) finish(tile);
    tile = next_tile, chunk = next_chunk, place = next_place, slot ^= 1;
  }
  if (p.stats.parts == nullptr) return;

  // The block's moments: those of a channel's lanes, then of the warps in order.
  merge_lanes(moments, 4);
  float* const s_parts = reinterpret_cast<float*>(s_halos);  // [warp][count, means, m2]
  constexpr int kPart = 1 + 2 * Tile::kOutputs;
  static_assert(Tile::kThreads / 32 * kPart * sizeof(float) <= 2 * Tile::kHalo * kPieces * sizeof(Piece));
  __syncthreads();
  if (lane < 4) {
    float* const part = s_parts + threadIdx.x / 32 * kPart;
    part[0] = moments.count;
#pragma unroll
    for (int k = 0; k < 4 * N16; ++k) {
      const int channel = k / 2 * 8 + lane * 2 + k % 2;
      part[1 + channel] = moments.mean[k];
      part[1 + Tile::kOutputs + channel] = moments.m2[k];
    }
  }
  __syncthreads();
  leave_moments<Tile::kOutputs>(s_parts, blockDim.x / 32, p.outputs, p.stats.parts);
  if (p.stats.ticket) p.stats.finish_last();
}

}  // namespace resdense::cuda
