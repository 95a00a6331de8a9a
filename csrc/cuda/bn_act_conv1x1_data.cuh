#pragma once
// The data gradient of a 1x1 convolution of act(scale * x + shift), channels-last: the mask, the batch norm's sums and
// the accumulation are done on the product where it arises.
//
// A warp walks down the positions with the weights of its channels. The warps of a block share the gradients of a tile of
// positions; everything else a lane reads and writes for itself. So there is one barrier a tile, and copies stay under way
// across it.

#include <type_traits>

#include "conv_data.cuh"

namespace resdense::cuda {

// The tiles, of the positions of a product, that have a place in shared memory, all but one of them under way: 16 KiB each for
// 6 warps that accumulate and 128 outputs.
constexpr int kDataStages = 6;

// For 128 outputs and C channels 128 positions cost, in clocks of a multiprocessor: 41 C for the bytes of x and out;
// 1,800 for those of the gradients, which L2 has for all but the first block that reads them; 13 C for the products;
// 18 C for shared memory; 23 C for the instructions.
template <int N64>
struct DataTile {
  static constexpr int kOutputs = 64 * N64;
  static constexpr int kPieces = kOutputs / 8;            // of 16 bytes, of a position's gradients
  static constexpr int kGrad = kDataPositions * kPieces;  // those of a tile
  static constexpr int kWarps = N64 == 2 ? 6 : 8;         // of a block, at most
  static constexpr int kBlocks = N64 == 3 ? 1 : 2;        // of so many warps, a multiprocessor

  static constexpr int stage(int warps, int maps) { return kGrad + warps * maps * kDataMap; }
  static constexpr int64_t bytes(int warps, int maps) { return int64_t(kDataStages) * 16 * stage(warps, maps); }

  // Every 8 pieces of a row are permuted so that those that ldmatrix reads at once, of 8 rows, lie in different banks.
  __device__ static int place(int row, int eight, int piece) { return row * kPieces + eight * 8 + (piece ^ (row & 7)); }
};

// A matrix as its rows lie in memory. An address is one instruction, a product of 32-bit numbers.
template <typename T>
struct DataRows {
  T* data;
  unsigned stride;  // in bytes

  __device__ T* at(unsigned row, int column) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(data + column) + uint64_t(row) * stride);
  }
};

template <typename T>
struct Conv1x1Data {
  DataRows<const T> grad, x;
  const float *scale, *shift, *center;
  const T* weight;  // [outputs][channels]
  DataRows<T> out;
  float slope;
  bool accumulate;
  int positions, channels, outputs;
  int tiles, slices, chunks;  // a block has every slices-th tile of the positions, and one of the channels' chunks
  float *sum_dy, *sum_dy_xc;  // [parts][channels]
};

template <typename T, int N64>
__global__ void __launch_bounds__(DataTile<N64>::kWarps * 32, DataTile<N64>::kBlocks)
    bn_act_conv1x1_data_bwd_kernel(Conv1x1Data<T> p) {
  start_kernel();
  using Tile = DataTile<N64>;
  using Piece = Vector<T, 8>;
  constexpr int kSteps = Tile::kOutputs / 16;

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int slice = blockIdx.x / p.chunks, chunk = blockIdx.x - slice * p.chunks;
  const int groups = (p.channels + kDataChannels - 1) / kDataChannels;
  const int group = chunk * groups / p.chunks + warp;
  const bool busy = group < (chunk + 1) * groups / p.chunks;
  const int channel = group * kDataChannels + lane % 4 * 8;
  const bool live = busy && channel < p.channels;

  // A stage has the gradients, and for each warp its values of x and, to accumulate, of out: the lanes' pieces of the
  // upper 8 positions, then of the lower.
  const int maps = p.accumulate ? 2 : 1, stage_pieces = Tile::stage(blockDim.x / 32, maps);
  Piece* const stages = reinterpret_cast<Piece*>(dynamic_shared());
  const int values = Tile::kGrad + warp * maps * kDataMap + lane;

  // A thread copies the same piece of the gradients of every rows_at_once-th position.
  const int rows_at_once = blockDim.x / Tile::kPieces, piece = thread % Tile::kPieces;
  const int first_row = thread < rows_at_once * Tile::kPieces ? thread / Tile::kPieces : kDataPositions;
  const auto copy = [&](int tile, int stage) {
    const int left = p.positions - tile * kDataPositions;
    Piece* const to = stages + stage * stage_pieces;
    if (left > 0) {
      for (int row = first_row; row < kDataPositions; row += rows_at_once) {
        const bool exists = row < left && piece * 8 < p.outputs;
        const T* const from = exists ? p.grad.at(tile * kDataPositions + row, piece * 8) : p.grad.data;
        copy_16_bytes(to + Tile::place(row, piece / 8, piece % 8), from, exists);
      }
#pragma unroll
      for (int row = lane / 4, half = 0; half < 2; row += 8, ++half) {
        if (!live || row >= left) continue;
        const int position = tile * kDataPositions + row;
        Piece* const here = to + values + half * 32;
        copy_16_bytes(here, p.x.at(position, channel), true);
        if (p.accumulate) copy_16_bytes(here + kDataMap, p.out.at(position, channel), true);
      }
    }
    commit_copies();
  };
#pragma unroll 1
  for (int stage = 0; stage < kDataStages - 1; ++stage) copy(slice + stage * p.slices, stage);

  uint32_t weight[kSteps][kDataColumns][2];
  const int weight_channel = group * kDataChannels + data_weight_channel();
  const bool has_weights = busy && weight_channel < p.channels;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const int outputs = has_weights ? p.outputs - k * 16 : 0;
    load_data_weights(p.weight, k * 16 * p.channels + weight_channel, p.channels, outputs, weight[k]);
  }

  DataSums sums;
  DataCoefficients coefficients;
  coefficients.load(p.scale, p.shift, p.center, channel, live);

  float product[kDataColumns][4];
  const auto multiply = [&](const Piece* grad) {
#pragma unroll
    for (auto& of_columns : product)
#pragma unroll
      for (float& value : of_columns) value = 0;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[4];
      load_matrices(a, grad + Tile::place(lane % 16, k / 4, k % 4 * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < kDataColumns; ++j) multiply_add(product[j], a, weight[k][j][0], weight[k][j][1], T{});
    }
  };

  const auto finish = [&](int tile, const Piece* from) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = tile * kDataPositions + half * 8 + lane / 4;
      if (!live || position >= p.positions) continue;
      // With a slope that the compiler knows its product is left out.
      const auto with_slope = [&](float slope) {
        return sums.mask(product, half, from + half * 32, coefficients, slope, p.accumulate);
      };
      store(p.out.at(position, channel), p.slope == 0 ? with_slope(0) : with_slope(p.slope));
    }
  };

  int stage = 0, count = 0;
  for (int tile = slice; tile < p.tiles; tile += p.slices) {
    wait_for_copies<kDataStages - 2>();
    __syncthreads();  // all are done with the tile before, too
    copy(tile + (kDataStages - 1) * p.slices, stage == 0 ? kDataStages - 1 : stage - 1);
    ++count;
    if (busy) {
      const Piece* const here = stages + stage * stage_pieces;
      multiply(here);
      finish(tile, here + values);
      if (count % kDataChain == 0 || tile + p.slices >= p.tiles) {
        const int64_t part = (count - 1) / kDataChain * p.slices + slice, at = part * p.channels + channel;
        sums.leave(live, p.sum_dy + at, p.sum_dy_xc + at);
      }
    }
    stage = stage + 1 == kDataStages ? 0 : stage + 1;
  }
}

}  // namespace resdense::cuda
