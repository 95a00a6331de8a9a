#pragma once
// The weight gradient of a 1x1 convolution of act(scale * x + shift), channels-last: grad^T act(scale * x + shift), a
// product summed over hundreds of thousands of positions.
//
// A block takes all outputs, up to 256 channels and a range of the positions, of which it multiplies a chunk while the
// next ones are on their way. Both operands have the summed dimension as their rows, so that both are read transposed;
// of eight channels a lane then has a single one, and activates it in registers, where its scale and shift stay. A pending
// gradient is finished in place a chunk ahead, every piece by the thread that has copied it: there is one barrier a chunk.

#include <algorithm>

#include "conv_weight.cuh"
#include "matrix.cuh"

namespace resdense::cuda {

constexpr int kWeightChunk = 32;    // positions
constexpr int kWeightThreads = 256;

// In clocks of a multiprocessor, for C channels, 128 outputs and 128 positions: 13.8 (C + 128) for the bytes of memory;
// 13 C for those of the second-level cache at 30 a clock, as the gradient comes again for every 256 channels (for every
// 128 it would be 17 C); 12.6 C for the products; 11 C for shared memory, of which every warp, with its 64 x 64
// products, uses each fragment four times (with 64 x 32 it would be 15 C); 9.5 C for what is issued. Two warps activate
// the same values: it is cheaper than to write them back. With 64 outputs no values are activated twice, and two blocks
// fit; with 192 there are registers for 192 channels, and the products take the longest, 18.9 C. To finish the gradient takes
// 3,500 for bytes of memory, once, and as often as it comes again 1,100 for those of the cache, 1,200 for shared memory and 800 to
// issue; a pass of its own takes 5,300.
template <int K64>
struct WeightTile {
  static constexpr int kWarpsAlongOutputs = K64 == 1 ? 1 : 2;
  static constexpr int kWarpsAlongChannels = kWeightThreads / 32 / kWarpsAlongOutputs;
  static constexpr int kPanels = K64 == 3 ? 3 : 4;  // of 64 channels, that a block has at most
  // A warp's products: kM16 times 16 outputs by kN16 times 16 channels, those of the warps taken in turn.
  static constexpr int kM16 = 4 * K64 / kWarpsAlongOutputs;
  static constexpr int kN16 = 4 * kPanels / kWarpsAlongChannels;
  static constexpr int kBlocks = K64 == 1 ? 2 : 1;  // a multiprocessor
  static constexpr int kStages = K64 == 1 ? 3 : 4;  // chunks in shared memory: multiplied, finished, copied
  static constexpr int kPanelPieces = kWeightChunk * 8;
  static constexpr int kX = K64 * kPanelPieces;                  // where a stage has x, behind the gradient,
  static constexpr int kZ = (K64 + kPanels) * kPanelPieces;      // and what the gradient is pending on
  static constexpr int kStagePieces = kZ + K64 * kPanelPieces;
  // A thread has the same piece of the gradient of every kGradRows-th position.
  static constexpr int kGradPieces = 8 * K64, kGradRows = kWeightThreads / kGradPieces;
  static constexpr int64_t kBytes = int64_t(kStages) * kStagePieces * 16;
};

template <typename T>
struct Conv1x1Weight {
  const T *grad, *x;
  const float *scale, *shift;
  PendingGrad<T> pending;
  float* parts;  // [splits][outputs][channels]
  float slope;
  int64_t grad_ss, x_ss;  // strides of a position
  int rows, channels, outputs;
  int tiles;              // of the channels, which the blocks of a split have side by side
  int split_chunks;
};

// Both halves of a word, or those whose row is one of the first `rows`.
__device__ inline uint32_t mask_of_rows(int row, int rows) {
  return (row < rows ? 0xffffu : 0) | (row + 1 < rows ? 0xffff0000u : 0);
}

template <typename T, int K64>
__global__ void __launch_bounds__(kWeightThreads, WeightTile<K64>::kBlocks)
    bn_act_conv1x1_weight_bwd_kernel(Conv1x1Weight<T> p) {
  start_kernel();
  using Tile = WeightTile<K64>;
  using Piece = Vector<T, 8>;
  constexpr int kRowsAtOnce = kWeightThreads / 8;
  static_assert(kWeightChunk % kRowsAtOnce == 0);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  constexpr int kWarpsM = Tile::kWarpsAlongOutputs, kWarpsN = Tile::kWarpsAlongChannels;
  const int warp_m = warp % kWarpsM, warp_n = warp / kWarpsM;
  const int split = blockIdx.x / p.tiles, tile = blockIdx.x - split * p.tiles;
  const int all_panels = (p.channels + 63) / 64;
  const int first_panel = all_panels * tile / p.tiles, panels = all_panels * (tile + 1) / p.tiles - first_panel;
  const int first_channel = first_panel * 64, end_channel = std::min(p.channels, first_channel + panels * 64);
  const int first_row = split * p.split_chunks * kWeightChunk;
  const int end_row = std::min(p.rows, first_row + p.split_chunks * kWeightChunk);

  // A stage has panels of rows of 64 channels.
  Piece* const s_stages = reinterpret_cast<Piece*>(dynamic_shared());

  // A thread copies the same piece of a row of every panel of x, and of every kRowsAtOnce-th row, chunk after chunk; what
  // does not exist is not read.
  const int copy_row = thread / 8, copy_piece = thread % 8;
  const int copy_to = Tile::kX + place_in_rows(copy_row, copy_piece);
  const int x_left = end_channel - first_channel - copy_piece * 8;
  const T* x = p.x + (first_row + copy_row) * p.x_ss + first_channel + copy_piece * 8;
  // f(row, place) for this thread's pieces of the gradient in a chunk.
  const int grad_channel = thread % Tile::kGradPieces * 8;
  const auto each_grad = [&](auto f) {
    if (thread >= Tile::kGradRows * Tile::kGradPieces) return;
#pragma unroll
    for (int row = thread / Tile::kGradPieces; row < kWeightChunk; row += Tile::kGradRows)
      f(row, grad_channel / 64 * Tile::kPanelPieces + place_in_rows(row, grad_channel / 8 % 8));
  };
  // A group of copies, of none where no chunk is left: so the groups can be counted.
  const auto copy_chunk = [&](int from_row, int slot) {
    if (from_row < end_row) {
      Piece* const stage = s_stages + slot * Tile::kStagePieces;
#pragma unroll
      for (int i = 0; i < kWeightChunk; i += kRowsAtOnce) {
        const bool inside = from_row + i + copy_row < end_row;
#pragma unroll
        for (int k = 0; k < Tile::kPanels; ++k)
          if (k < panels) copy_16_bytes(stage + copy_to + i * 8 + k * Tile::kPanelPieces, x + k * 64, inside && k * 64 < x_left);
        x += kRowsAtOnce * p.x_ss;
      }
      each_grad([&](int row, int place) {
        const bool inside = from_row + row < end_row && grad_channel < p.outputs;
        copy_16_bytes(stage + place, p.grad + ((from_row + row) * p.grad_ss + grad_channel), inside);
        if (p.pending.z)
          copy_16_bytes(stage + Tile::kZ + place, p.pending.z + ((from_row + row) * p.pending.z_ss + grad_channel), inside);
      });
    }
    commit_copies();
  };
  // What this thread has copied.
  const auto finish_chunk = [&](int from_row, int slot) {
    if (!p.pending.z) return;
    Piece* const stage = s_stages + slot * Tile::kStagePieces;
    each_grad([&](int row, int place) {
      if (from_row + row >= end_row || grad_channel >= p.outputs) return;
      const Piece finished = p.pending.finish(stage[place], stage[Tile::kZ + place], grad_channel);
      stage[place] = finished;
      if (tile == 0) store(p.pending.finished + ((from_row + row) * p.pending.finished_ss + grad_channel), finished);
    });
  };

  // This lane's channel of each eight of the warp's.
  float scale[2 * Tile::kN16], shift[2 * Tile::kN16];
#pragma unroll
  for (int n = 0; n < 2 * Tile::kN16; ++n) {
    const int channel = first_channel + (n / 2 * kWarpsN + warp_n) * 16 + n % 2 * 8 + lane / 4;
    scale[n] = channel < end_channel ? p.scale[channel] : 0;
    shift[n] = channel < end_channel ? p.shift[channel] : 0;
  }

  // Of the rows of a stage that this lane brings to ldmatrix, the first of the gradient's first panel and of the first
  // panel of x that its warp has a part of.
  const int load_row = lane % 8 + lane / 16 * 8, load_piece = lane / 8 % 2;
  int load_grad[4 / kWarpsM];
#pragma unroll
  for (int m = 0; m < 4 / kWarpsM; ++m) load_grad[m] = place_in_rows(load_row, (m * kWarpsM + warp_m) * 2 + load_piece);
  const int load_x = Tile::kX + warp_n / 4 * Tile::kPanelPieces + place_in_rows(load_row, warp_n % 4 * 2 + load_piece);

  float sums[Tile::kM16][2 * Tile::kN16][4] = {};

  // Of the first N16 times 16 channels of every warp, of which some may not exist: nothing of them is stored. Rows that
  // do not exist are part of every sum, and what the activation makes of them is not always 0 times their gradient of
  // 0.
  const auto multiply = [&]<int N16, bool ALL_ROWS>(const Piece* stage, int rows, float slope) {
#pragma unroll(ALL_ROWS ? kWeightChunk / 16 : 1)
    for (int row = 0; row < kWeightChunk; row += 16) {
      uint32_t a[Tile::kM16][4];
#pragma unroll
      for (int m = 0; m < Tile::kM16; ++m) {
        const int panel = m * kWarpsM / 4, from = load_grad[m % (4 / kWarpsM)];
        load_matrices_transposed(a[m], stage + from + panel * Tile::kPanelPieces + row * 8);
      }
#pragma unroll
      for (int n = 0; n < N16; ++n) {
        uint32_t b[4];  // upper and lower rows of the first eight channels are 0 and 2, of the others 1 and 3
        load_matrices_transposed(b, stage + load_x + n * kWarpsN / 4 * Tile::kPanelPieces + row * 8);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float s = scale[2 * n + i % 2], t = shift[2 * n + i % 2];
          b[i] = activate_pair<T>(b[i], {s, s}, {t, t}, slope);
          if (!ALL_ROWS) b[i] &= mask_of_rows(row + i / 2 * 8 + lane % 4 * 2, rows);
        }
#pragma unroll
        for (int m = 0; m < Tile::kM16; ++m) {
          multiply_add(sums[m][2 * n], a[m], b[0], b[2], T{});
          multiply_add(sums[m][2 * n + 1], a[m], b[1], b[3], T{});
        }
      }
    }
  };

  for (int slot = 0; slot < Tile::kStages - 1; ++slot) copy_chunk(first_row + slot * kWeightChunk, slot);
  wait_for_copies<Tile::kStages - 2>();
  finish_chunk(first_row, 0);
  int slot = 0, free_slot = Tile::kStages - 1;
  for (int row = first_row; row < end_row; row += kWeightChunk) {
    wait_for_copies<Tile::kStages - 3>();
    __syncthreads();  // the chunk is there, and all are done with the one before, whose place is free
    copy_chunk(row + (Tile::kStages - 1) * kWeightChunk, free_slot);
    const int next_slot = slot + 1 == Tile::kStages ? 0 : slot + 1;
    finish_chunk(row + kWeightChunk, next_slot);

    const Piece* const stage = s_stages + slot * Tile::kStagePieces;
    const int rows = end_row - row;
    if (p.slope != 0 || rows < kWeightChunk) {
      multiply.template operator()<Tile::kN16, false>(stage, rows, p.slope);
    } else {
      // With a slope that the compiler knows the ReLU is part of the rounding.
      const int n16 = (panels * 4 + kWarpsN - 1) / kWarpsN;
      if (n16 == 1)
        multiply.template operator()<1, true>(stage, rows, 0);
      else if (n16 == 2 && Tile::kN16 > 2)
        multiply.template operator()<2, true>(stage, rows, 0);
      else if (n16 == 3 && Tile::kN16 > 3)
        multiply.template operator()<std::min(3, Tile::kN16), true>(stage, rows, 0);
      else
        multiply.template operator()<Tile::kN16, true>(stage, rows, 0);
    }
    free_slot = slot, slot = next_slot;
  }

  float* const part = p.parts + int64_t(split) * p.outputs * p.channels;
#pragma unroll
  for (int m = 0; m < Tile::kM16; ++m) {
#pragma unroll
    for (int n = 0; n < 2 * Tile::kN16; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int output = (m * kWarpsM + warp_m) * 16 + half * 8 + lane / 4;
        const int channel = first_channel + (n / 2 * kWarpsN + warp_n) * 16 + n % 2 * 8 + lane % 4 * 2;
        const auto& sum = sums[m][n];
        if (output < p.outputs && channel < end_channel)
          store<float, 2>(part + int64_t(output) * p.channels + channel, {sum[2 * half], sum[2 * half + 1]});
      }
    }
  }
}

}  // namespace resdense::cuda
