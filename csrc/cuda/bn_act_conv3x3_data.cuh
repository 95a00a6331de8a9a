#pragma once
// The data gradient of a 3x3 convolution of act(scale * x + shift), channels-last: the mask, the batch norm's sums and the
// accumulation are done on the product where it arises.
//
// A warp keeps the weights of its channels, of all taps, in registers, and multiplies by them the gradients around every 16
// positions of a tile, which the warps of a block share: the rows of a tap are those of the first tap, shifted. What else a lane
// reads is its own, so that it copies the values of the next tile to where it has just used those of this one; the gradients
// have two places in turn. So there is one barrier a tile, copies of almost a whole tile are always under way, and two blocks
// have room in a multiprocessor: one multiplies while the other masks.

#include <algorithm>
#include <utility>

#include "conv_data.cuh"
#include "stack.cuh"

namespace resdense::cuda {

// For 32 outputs and 128 channels 128 positions cost, in clocks of a multiprocessor: 4,200 for their bytes, 6,000 to accumulate
// (the gradients around a tile are 1.6 times its own, of which L2 has most); 3,600 for the products, at the rate of mma.sync;
// 3,500 for shared memory, as a warp uses each fragment 4 times, 4,000 to accumulate; 3,300 for the instructions.
template <int N16>
struct Conv3x3DataTile {
  static constexpr int kSteps = 4;  // of a tile, at most: each takes the positions of a product
  static constexpr int kPositions = kSteps * kDataPositions;
  static constexpr int kHalo = 104;  // positions of the tile and around it, at most
  static constexpr int kWarps = 4;   // of a block, at most
  static constexpr int kBlocks = N16 == 1 ? 3 : 2;

  // In 16-byte pieces: the gradients of a position, what a position of the halo takes, and what one of its rows takes. Positions
  // of a tile that follow each other are kPitch pieces apart, modulo 8, also where a row of the tile ends: the eight that
  // ldmatrix reads at once lie in different banks.
  static constexpr int kPieces = 2 * N16, kPitch = kPieces + 1;
  static constexpr int row_pitch(int tile_columns) { return tile_columns * kPitch + (2 * kPitch + 7) / 8 * 8; }
  static constexpr int halo_pieces(int tile_rows, int tile_columns) { return (tile_rows + 2) * row_pitch(tile_columns); }
};

template <typename T>
struct Conv3x3DataMap {
  T* data;
  int64_t sn;  // strides of sample and position
  int ss;
};

template <typename T>
struct Conv3x3Data {
  Conv3x3DataMap<T> grad, x, out;
  const float *scale, *shift, *center;
  const T* weight;  // [outputs][3][3][channels]
  float slope;
  bool accumulate;
  int channels, outputs;
  Stack stack;
  int slices, chunks;                  // a block has every slices-th tile, and one of the channels' chunks:
  int across, down;                    // so many warps for its channels, and so many times these for the positions
  int chain;                           // the tiles after which a warp leaves its sums
  float *sum_dy, *sum_dy_xc;           // [parts][channels]
};

// What shared memory begins with. There follow two halos of gradients, and the values of a tile for each warp across.
template <int N16>
struct Conv3x3DataTables {
  using Tile = Conv3x3DataTile<N16>;

  // Where the positions of a tile, and of its halo, lie in the maps; -1 where there are none.
  struct Offsets {
    int64_t grad[Tile::kHalo], x[Tile::kPositions], out[Tile::kPositions];
  } of_tiles[3];
  DataCoefficients coefficients[Tile::kWarps * kDataColumns];
  struct Place {
    uint16_t row, column;
  } places[Tile::kHalo];        // of the halo's positions
  int first[Tile::kPositions];  // the piece of the halo that begins what is around a position of the tile

  static constexpr int64_t bytes(int64_t halo_pieces, int64_t across, int64_t maps) {
    return sizeof(Conv3x3DataTables) + 16 * (2 * halo_pieces + across * Tile::kSteps * maps * kDataMap);
  }
};

template <typename T, int N16>
__global__ void __launch_bounds__(Conv3x3DataTile<N16>::kWarps * 32, Conv3x3DataTile<N16>::kBlocks)
    bn_act_conv3x3_data_bwd_kernel(Conv3x3Data<T> p) {
  start_kernel();
  using Tile = Conv3x3DataTile<N16>;
  using Piece = Vector<T, 8>;
  using Tables = Conv3x3DataTables<N16>;
  using Offsets = typename Tables::Offsets;

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int slice = blockIdx.x / p.chunks, chunk = blockIdx.x - slice * p.chunks;
  const int groups = (p.channels + kDataChannels - 1) / kDataChannels, first_group = chunk * groups / p.chunks;
  const int lower = warp / p.across, beside = warp - lower * p.across, group = first_group + beside;
  const bool busy = group < (chunk + 1) * groups / p.chunks;
  const int channel = group * kDataChannels + lane % 4 * 8;
  const bool live = busy && channel < p.channels;

  const Stack& stack = p.stack;
  const int maps = p.accumulate ? 2 : 1, row_pitch = Tile::row_pitch(stack.tile_columns);
  const int positions = stack.tile_rows * stack.tile_columns, halo = stack.halo();
  Tables& s_tables = *reinterpret_cast<Tables*>(dynamic_shared());
  Offsets *now = &s_tables.of_tiles[0], *next = now + 1, *after = next + 1;
  const int halo_pieces = Tile::halo_pieces(stack.tile_rows, stack.tile_columns);
  Piece *here = reinterpret_cast<Piece*>(&s_tables + 1), *there = here + halo_pieces;
  // A lane's pieces: of the upper 8 positions of a product, then of the lower, of one map and then the other.
  Piece* const s_values = there + halo_pieces + beside * Tile::kSteps * maps * kDataMap + lane;

  const auto find_positions = [&](int tile, Offsets& to) {
    if (tile >= stack.tiles) return;
    const int top = stack.by_strips.quotient(tile), left = tile - top * stack.strips;
    for (int i = thread; i < halo; i += blockDim.x) {
      const int row = s_tables.places[i].row - 1, column = s_tables.places[i].column - 1;
      const int in_stack = top * stack.tile_rows + row, in_map = left * stack.tile_columns + column;
      const int n = stack.by_sample.quotient(std::max(in_stack, 0)), y = in_stack - n * (stack.height + 1);
      const bool is_row = unsigned(in_stack) < unsigned(stack.rows) && y != stack.height;
      const bool exists = is_row && unsigned(in_map) < unsigned(stack.width);
      const auto offset = [&](const Conv3x3DataMap<T>& m) {
        return exists ? n * m.sn + (int64_t(y) * stack.width + in_map) * m.ss : -1;
      };
      to.grad[i] = offset(p.grad);
      if (unsigned(row) < unsigned(stack.tile_rows) && unsigned(column) < unsigned(stack.tile_columns)) {
        const int q = row * stack.tile_columns + column;
        to.x[q] = offset(p.x), to.out[q] = offset(p.out);
      }
    }
  };

  // A thread copies the same piece of the gradients of every so many-th position.
  const auto copy_halo = [&](const Offsets& from, Piece* to) {
    const int piece = thread % Tile::kPieces;
    for (int i = thread / Tile::kPieces; i < halo; i += blockDim.x / Tile::kPieces) {
      const auto [row, column] = s_tables.places[i];
      const bool exists = from.grad[i] >= 0 && piece * 8 < p.outputs;
      const T* const grad = p.grad.data + (exists ? from.grad[i] + piece * 8 : 0);
      copy_16_bytes(to + row * row_pitch + column * Tile::kPitch + piece, grad, exists);
    }
  };
  // Those of the lane's two positions of a step.
  const auto copy_values = [&](int step, const Offsets& from) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int q = step * kDataPositions + half * 8 + lane / 4;
      if (!live || from.x[q] < 0) continue;
      Piece* const to = s_values + step * maps * kDataMap + half * 32;
      copy_16_bytes(to, p.x.data + (from.x[q] + channel), true);
      if (p.accumulate) copy_16_bytes(to + kDataMap, p.out.data + (from.out[q] + channel), true);
    }
  };

  for (int i = thread; i < halo; i += blockDim.x) {
    const int row = stack.by_pitch.quotient(i);
    s_tables.places[i] = {uint16_t(row), uint16_t(i - row * stack.pitch())};
  }
  for (int q = thread; q < Tile::kPositions; q += blockDim.x) {
    const int row = stack.by_columns.quotient(q);
    s_tables.first[q] = q < positions ? q * Tile::kPitch + row * (row_pitch - stack.tile_columns * Tile::kPitch) : 0;
    for (Offsets& offsets : s_tables.of_tiles) offsets.x[q] = offsets.out[q] = -1;
  }
  for (int i = thread; i < p.across * kDataColumns; i += blockDim.x) {
    const int from = first_group * kDataChannels + i * 8;
    s_tables.coefficients[i].load(p.scale, p.shift, p.center, from, from < p.channels);
  }
  __syncthreads();
  find_positions(slice, *now);
  find_positions(slice + p.slices, *next);
  __syncthreads();
  copy_halo(*now, here);
  // A warp takes every down-th step, and closes as many groups of copies a tile, whatever there is to copy.
#pragma unroll 1
  for (int i = 0; i < Tile::kSteps; ++i) {
    const int step = i * p.down + lower;
    if (step < Tile::kSteps) copy_values(step, *now);
    commit_copies();
  }

  uint32_t weight[kConvTaps][N16][kDataColumns][2];
  const int weight_channel = group * kDataChannels + data_weight_channel();
  const bool has_weights = busy && weight_channel < p.channels;
#pragma unroll
  for (int tap = 0; tap < kConvTaps; ++tap) {
#pragma unroll
    for (int n = 0; n < N16; ++n) {
      const int first = (n * 16 * kConvTaps + tap) * p.channels + weight_channel;
      const int outputs = has_weights ? p.outputs - n * 16 : 0;
      load_data_weights(p.weight, first, kConvTaps * p.channels, outputs, weight[tap][n]);
    }
  }

  // `first` is the piece around the lane's position that it brings to ldmatrix for the last tap.
  float product[kDataColumns][4];
  const auto multiply = [&](const Piece* first) {
#pragma unroll
    for (auto& of_columns : product)
#pragma unroll
      for (float& value : of_columns) value = 0;
#pragma unroll
    for (int dy = 0; dy < 3; ++dy) {
      const Piece* const row = first + (2 - dy) * row_pitch;
#pragma unroll
      for (int dx = 0; dx < 3; ++dx) {
#pragma unroll
        for (int n = 0; n < N16; ++n) {
          uint32_t a[4];
          load_matrices(a, row + (2 - dx) * Tile::kPitch + n * 2);
          const auto& b = weight[dy * 3 + dx][n];
#pragma unroll
          for (int j = 0; j < kDataColumns; ++j) multiply_add(product[j], a, b[j][0], b[j][1], T{});
        }
      }
    }
  };

  DataSums sums;
  const auto finish = [&](int step) {
    const DataCoefficients coefficients = s_tables.coefficients[beside * kDataColumns + lane % 4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t offset = now->out[step * kDataPositions + half * 8 + lane / 4];
      if (!live || offset < 0) continue;
      const Piece* const from = s_values + step * maps * kDataMap + half * 32;
      // With a slope that the compiler knows its product is left out.
      const auto with_slope = [&](float slope) { return sums.mask(product, half, from, coefficients, slope, p.accumulate); };
      store(p.out.data + (offset + channel), p.slope == 0 ? with_slope(0) : with_slope(p.slope));
    }
  };

  int summed = 0, part = slice * p.down + lower;
  for (int tile = slice; tile < stack.tiles; tile += p.slices) {
    const bool more = tile + p.slices < stack.tiles;
#pragma unroll 1
    for (int i = 0; i < Tile::kSteps; ++i) {
      wait_for_copies<Tile::kSteps - 1>();
      if (i == 0) {
        __syncthreads();  // all are done with the tile before, too
        if (more) copy_halo(*next, there);
        find_positions(tile + 2 * p.slices, *after);
      }
      const int step = i * p.down + lower;
      if (busy && step * kDataPositions < positions) {
        multiply(here + s_tables.first[step * kDataPositions + lane % 16] + lane / 16);
        finish(step);
        if (more) copy_values(step, *next);
      }
      commit_copies();
    }
    if (busy && (++summed == p.chain || !more)) {
      const int64_t at = int64_t(part) * p.channels + channel;
      sums.leave(live, p.sum_dy + at, p.sum_dy_xc + at);
      summed = 0, part += p.slices * p.down;
    }
    Offsets* const used = now;
    now = next, next = after, after = used;
    std::swap(here, there);
  }
}

}  // namespace resdense::cuda
