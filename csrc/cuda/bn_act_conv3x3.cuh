#pragma once
// A 3x3 convolution of act(scale * x + shift), channels-last, whose tile is activated once in shared memory.
//
// A block takes every gridDim.x-th tile of the stack of rows, and the channels of a tile in chunks: while one chunk is
// multiplied, the values of the next are on their way to registers; then they are activated and stored for `ldmatrix`,
// which reads the rows of a tap as those of the first tap, shifted.

#include <bit>

#include "conv.cuh"
#include "matrix.cuh"
#include "stack.cuh"

namespace resdense::cuda {

constexpr int kConvChunk = 32;  // channels

// For 128 -> 32 channels a large tile (256 positions) costs, in clocks of a multiprocessor: 4,400 for its bytes; 4,500 for its
// products at the rate of wgmma, some 7,500 at that of mma.sync; 6,900 for reading its fragments, of which a warp, with its
// 64 x 32 products, uses each 4 times; 1,400 for the activation of its halo. The weights, 72 KiB, stay in shared memory for all
// tiles of a block where the blocks of a multiprocessor have room for them (the halo takes 25 KiB); else they come anew for
// every tile, a chunk ahead. A small tile (64 positions) is for maps that do not fill the device.
template <int N16, bool LARGE>
struct ConvTile {
  static constexpr int kOutputs = 16 * N16;
  static constexpr int kM16 = !LARGE ? 1 : N16 <= 2 ? 4 : 2;  // a warp's products: 16 kM16 positions by kOutputs channels
  static constexpr int kPositions = LARGE ? 256 : 64;
  static constexpr int kThreads = kPositions / (16 * kM16) * 32;
  static constexpr int kBlocks = LARGE && N16 > 2 ? 1 : 2;  // a multiprocessor
  static constexpr int kHalo = !LARGE ? 128 : N16 <= 2 ? 352 : 320;  // positions of the tile and around it, at most
  static constexpr int kWeights = kConvTaps * kOutputs * kConvChunk;

  // Shared memory: the halo, where it comes from, scale and shift, and `slots` chunks of the weights.
  static constexpr int64_t bytes(int64_t chunks, int64_t slots) {
    return kHalo * (kConvChunk * 2 + 8) + chunks * kConvChunk * 8 + slots * kWeights * 2;
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
  int slots;                           // chunks of the weights that have a place in shared memory
  float* parts;                        // count, means and m2 that a block leaves; none where there are no statistics
};

// Shared memory holds rows of kConvChunk channels in 16-byte pieces. The eight rows that ldmatrix reads at once have
// consecutive `key`s; their pieces are permuted so that all of them lie in different banks.
__device__ inline int swizzled(int row, int key, int piece) { return row * 4 + (piece ^ ((key >> 1) & 3)); }

template <typename T, int N16, bool LARGE>
__global__ void __launch_bounds__(ConvTile<N16, LARGE>::kThreads, ConvTile<N16, LARGE>::kBlocks)
    bn_act_conv3x3_fwd_kernel(Conv3x3<T> p) {
  using Tile = ConvTile<N16, LARGE>;
  using Piece = Vector<T, 8>;
  constexpr int kPieces = kConvChunk / 8;
  constexpr int kRowsAtOnce = Tile::kThreads / kPieces;
  constexpr int kLoads = Tile::kHalo / kRowsAtOnce;
  static_assert(kPieces == 4 && Tile::kHalo % kRowsAtOnce == 0 && kLoads <= 16);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int chunks = (p.channels + kConvChunk - 1) / kConvChunk;
  const Stack& stack = p.stack;
  const int pitch = stack.pitch(), halo = stack.halo();

  Piece* const s_tile = reinterpret_cast<Piece*>(dynamic_shared());
  Piece* const s_weight = s_tile + Tile::kHalo * kPieces;
  int64_t* const s_offset = reinterpret_cast<int64_t*>(s_weight + p.slots * (Tile::kWeights / 8));
  float* const s_scale = reinterpret_cast<float*>(s_offset + Tile::kHalo);
  float* const s_shift = s_scale + chunks * kConvChunk;

  // A thread loads the same piece of every kRowsAtOnce-th position of the halo.
  const int piece = thread % kPieces, first = thread / kPieces;
  uint32_t keys = 0;
  for (int i = 0; i < kLoads; ++i) {
    const int row = first + i * kRowsAtOnce;
    keys |= (((row >> 1) - row / pitch) & 3u) << 2 * i;
  }

  // The positions of the tile that this lane brings to ldmatrix, as rows of the halo.
  int positions[Tile::kM16];
#pragma unroll
  for (int m = 0; m < Tile::kM16; ++m) {
    const int q = (warp * Tile::kM16 + m) * 16 + lane % 16;
    const int row = q / stack.tile_columns;
    positions[m] = row < stack.tile_rows ? q + 2 * row : 0;
  }

  const auto place_halo = [&](int tile) {
    const int top = tile / stack.strips, left = tile - top * stack.strips;
    for (int i = thread; i < Tile::kHalo; i += Tile::kThreads) {
      const int row = i / pitch, column = i - row * pitch;
      const int64_t offset = stack.offset(top * stack.tile_rows + row - 1, left * stack.tile_columns + column - 1, p.x_sn, p.x_ss);
      s_offset[i] = i < halo ? offset : -1;
    }
  };

  // As words, since 16-bit values that are loaded on a condition would take a register each.
  Vector<uint32_t, 4> values[kLoads];
  uint32_t inside = 0;  // a bit for each of the values that is not padding
  const auto load_values = [&](int chunk) {
    const int channel = chunk * kConvChunk + piece * 8;
    inside = 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t offset = s_offset[first + i * kRowsAtOnce];
      if (offset >= 0 && channel < p.channels) {
        values[i] = load<uint32_t, 4>(reinterpret_cast<const uint32_t*>(p.x + offset + channel));
        inside |= 1u << i;
      }
    }
  };

  const auto activate_values = [&](int chunk, float slope) {
    const int channel = chunk * kConvChunk + piece * 8;
    float scale[8], shift[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      scale[k] = s_scale[channel + k];
      shift[k] = s_shift[channel + k];
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      Piece activated = std::bit_cast<Piece>(values[i]);
#pragma unroll
      for (int k = 0; k < 8; ++k)
        narrow(activate(scale[k] * widen(activated.v[k]) + shift[k], slope), activated.v[k]);
      auto words = std::bit_cast<Vector<uint32_t, 4>>(activated);
#pragma unroll
      for (uint32_t& word : words.v) word = inside >> i & 1 ? word : 0;
      s_tile[swizzled(first + i * kRowsAtOnce, keys >> 2 * i << 1, piece)] = std::bit_cast<Piece>(words);
    }
  };

  const auto copy_weights = [&](int chunk, Piece* to) {
    const int channel = chunk * kConvChunk + piece * 8;
    for (int row = first; row < kConvTaps * Tile::kOutputs; row += kRowsAtOnce) {
      const int tap = row / Tile::kOutputs, output = row - tap * Tile::kOutputs;
      const bool exists = output < p.outputs && channel < p.channels;
      const int64_t from = exists ? (int64_t(output) * kConvTaps + tap) * p.channels + channel : 0;
      copy_16_bytes(to + swizzled(row, row, piece), p.weight + from, exists);
    }
  };

  float sums[Tile::kM16][2 * N16][4];
  const auto multiply = [&](const Piece* weight) {
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
            load_matrices(a, s_tile + swizzled(positions[m] + dy * pitch + dx, key, k + lane / 16));
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
    const int top = tile / stack.strips, left = tile - top * stack.strips;
    uint32_t written = 0;
#pragma unroll
    for (int i = 0; i < 2 * Tile::kM16; ++i) {
      const int m = i / 2, half = i % 2 * 2;
      const int q = (warp * Tile::kM16 + m) * 16 + half * 4 + lane / 4;
      const int row = q / stack.tile_columns, column = q - row * stack.tile_columns;
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
    if (p.parts == nullptr) return;
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

  for (int channel = thread; channel < p.channels; channel += Tile::kThreads) {
    s_scale[channel] = p.scale[channel];
    s_shift[channel] = p.shift[channel];
  }
  int tile = blockIdx.x, chunk = 0;
  place_halo(tile);
  __syncthreads();
  load_values(0);
  copy_weights(0, s_weight);
  // The place of the chunk's weights: its own, or one of two in turn.
  for (int slot = 0;;) {
    __syncthreads();  // all are done with the chunk before
    // With a slope that the compiler knows the ReLU is part of the rounding.
    if (p.slope == 0)
      activate_values(chunk, 0);
    else
      activate_values(chunk, p.slope);
    const bool last = chunk + 1 == chunks;
    const int next_tile = last ? tile + gridDim.x : tile;
    if (last && next_tile < stack.tiles) place_halo(next_tile);
    finish_copies();
    __syncthreads();

    const int next_chunk = last ? 0 : chunk + 1;
    const int next_slot = p.slots == chunks ? next_chunk : slot ^ 1;
    if (next_tile < stack.tiles) {
      load_values(next_chunk);
      if (p.slots < chunks || (tile == int(blockIdx.x) && !last))
        copy_weights(next_chunk, s_weight + next_slot * (Tile::kWeights / 8));
    }
    if (chunk == 0) {
#pragma unroll
      for (auto& of_positions : sums)
#pragma unroll
        for (auto& of_outputs : of_positions)
#pragma unroll
          for (float& sum : of_outputs) sum = 0;
    }
    multiply(s_weight + slot * (Tile::kWeights / 8));
    if (last) finish(tile);
    if (next_tile >= stack.tiles) break;
    tile = next_tile, chunk = next_chunk, slot = next_slot;
  }
  if (p.parts == nullptr) return;

  // The block's moments: those of a channel's lanes, then of the warps in order.
  merge_lanes(moments, 4);
  constexpr int kWarps = Tile::kThreads / 32;
  float* const s_parts = reinterpret_cast<float*>(s_tile);  // [warp][count, means, m2]
  constexpr int kPart = 1 + 2 * Tile::kOutputs;
  static_assert(kWarps * kPart * sizeof(float) <= Tile::kHalo * kPieces * sizeof(Piece));
  __syncthreads();
  if (lane < 4) {
    float* const part = s_parts + warp * kPart;
    part[0] = moments.count;
#pragma unroll
    for (int k = 0; k < 4 * N16; ++k) {
      const int channel = k / 2 * 8 + lane * 2 + k % 2;
      part[1 + channel] = moments.mean[k];
      part[1 + Tile::kOutputs + channel] = moments.m2[k];
    }
  }
  __syncthreads();
  leave_moments<kWarps, Tile::kOutputs>(s_parts, p.outputs, p.parts);
}

}  // namespace resdense::cuda
