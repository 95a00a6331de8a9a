#pragma once
// The data gradient of a 1x1 convolution of act(scale * x + shift), channels-last: the mask, the batch norm's sums and
// the accumulation are done on the product where it arises.
//
// A warp keeps the weights of kDataChannels of the input's channels in registers, as fragments, and walks down the
// positions. The warps of a block share the gradients of a tile of positions; everything else a lane reads and writes
// for itself: the columns of the products are permuted so that it has 8 neighbouring channels, whose sums it keeps. So
// there is one barrier a tile, and copies stay under way across it.

#include <type_traits>

#include "bn_act.cuh"
#include "matrix.cuh"

namespace resdense::cuda {

constexpr int kDataPositions = 16;  // of a tile
constexpr int kDataChannels = 32;   // of a warp
// The tiles that have a place in shared memory, all but one of them under way: 16 KiB each for 6 warps that accumulate
// and 128 outputs.
constexpr int kDataStages = 6;
// The tiles after which a warp leaves its sums: a lane adds up two positions of each, and a longer chain loses digits.
constexpr int kDataChain = 32;

// For 128 outputs and C channels 128 positions cost, in clocks of a multiprocessor: 41 C for the bytes of x and out;
// 1,800 for those of the gradients, which L2 has for all but the first block that reads them; 13 C for the products;
// 18 C for shared memory; 23 C for the instructions.
template <int N64>
struct DataTile {
  static constexpr int kOutputs = 64 * N64;
  static constexpr int kPieces = kOutputs / 8;                     // of 16 bytes, of a position's gradients
  static constexpr int kGrad = kDataPositions * kPieces;           // those of a tile
  static constexpr int kMap = kDataPositions * kDataChannels / 8;  // and those that a warp has of a map
  static constexpr int kWarps = N64 == 2 ? 6 : 8;                  // of a block, at most
  static constexpr int kBlocks = N64 == 3 ? 1 : 2;                 // of so many warps, a multiprocessor

  static constexpr int stage(int warps, int maps) { return kGrad + warps * maps * kMap; }
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
  using Tile = DataTile<N64>;
  using Piece = Vector<T, 8>;
  constexpr int kSteps = Tile::kOutputs / 16, kColumns = kDataChannels / 8;

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
  const int mine = Tile::kGrad + warp * maps * Tile::kMap + lane;

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
        Piece* const here = to + mine + half * 32;
        copy_16_bytes(here, p.x.at(position, channel), true);
        if (p.accumulate) copy_16_bytes(here + Tile::kMap, p.out.at(position, channel), true);
      }
    }
    commit_copies();
  };
#pragma unroll 1
  for (int stage = 0; stage < kDataStages - 1; ++stage) copy(slice + stage * p.slices, stage);

  // Column c of the j-th product of 8 columns is the warp's channel c / 2 * 8 + 2 * j + c % 2: those that a lane has of
  // all four are neighbours. A fragment takes one channel of the rows of two outputs, and 16 bytes of such a row have
  // one for each of the products.
  uint32_t weight[kSteps][kColumns][2];
  const int first_channel = group * kDataChannels + lane / 8 * 8;
  const bool odd = lane / 4 % 2;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int output = k * 16 + half * 8 + lane % 4 * 2;
      Vector<uint32_t, 4> rows[2] = {};
      if (busy && output < p.outputs && first_channel < p.channels) {
        const T* const from = p.weight + int64_t(output) * p.channels + first_channel;
        rows[0] = load<uint32_t, 4>(reinterpret_cast<const uint32_t*>(from));
        rows[1] = load<uint32_t, 4>(reinterpret_cast<const uint32_t*>(from + p.channels));
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        weight[k][j][half] = odd ? rows[0].v[j] >> 16 | (rows[1].v[j] & 0xffff0000u)
                                 : (rows[0].v[j] & 0xffffu) | rows[1].v[j] << 16;
      }
    }
  }

  float scale[8], shift[8], center[8];
  load_neighbours(p.scale + channel, live ? 8 : 0, scale);
  load_neighbours(p.shift + channel, live ? 8 : 0, shift);
  load_neighbours(p.center + channel, live ? 8 : 0, center);
  Sums<float, 8> sums;

  float product[kColumns][4];
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
      for (int j = 0; j < kColumns; ++j) multiply_add(product[j], a, weight[k][j][0], weight[k][j][1], T{});
    }
  };

  // What a lane writes to one of its two positions; `from` has what it reads.
  const auto masked = [&]<bool ACCUMULATE>(const Piece* from, int half, float slope) {
    const Piece x = from[0], before = from[ACCUMULATE * Tile::kMap];
    float result[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      result[k] = mask_value<ACCUMULATE>(product[k / 2][half * 2 + k % 2], widen(x.v[k]), widen(before.v[k]), scale[k],
                                         shift[k], center[k], slope, k, sums);
    }
    return narrow<T>(result);
  };
  const auto finish = [&](int tile, const Piece* from) {
    const auto with_slope = [&](int half, float slope) {
      return p.accumulate ? masked.template operator()<true>(from + half * 32, half, slope)
                          : masked.template operator()<false>(from + half * 32, half, slope);
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = tile * kDataPositions + half * 8 + lane / 4;
      if (!live || position >= p.positions) continue;
      // With a slope that the compiler knows its product is left out.
      store(p.out.at(position, channel), p.slope == 0 ? with_slope(half, 0) : with_slope(half, p.slope));
    }
  };

  // Adds up the sums of the lanes that have the same channels, and leaves them.
  const auto leave_sums = [&](int part) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
#pragma unroll
      for (int other = 4; other < 32; other *= 2)
        sums.add(k, __shfl_xor_sync(0xffffffffu, sums.a[k], other), __shfl_xor_sync(0xffffffffu, sums.b[k], other));
      const int64_t at = int64_t(part) * p.channels + channel + k;
      if (live && lane < 4) sums.put(k, p.sum_dy + at, p.sum_dy_xc + at);
    }
    sums = {};
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
      finish(tile, here + mine);
      if (count % kDataChain == 0 || tile + p.slices >= p.tiles)
        leave_sums((count - 1) / kDataChain * p.slices + blockIdx.x / p.chunks);
    }
    stage = stage + 1 == kDataStages ? 0 : stage + 1;
  }
}

}  // namespace resdense::cuda
