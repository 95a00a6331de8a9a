#pragma once
// The weight gradient of a 3x3 convolution of act(scale * x + shift), channels-last: for every tap grad^T times the activation
// that lies a step beside it, summed over the positions.
//
// A block takes all outputs, up to 64 channels and every splits-th tile of the stack of rows, and keeps the sums of all taps in
// registers to the end. While a tile is multiplied, every thread activates in place those pieces of the next one that it has
// copied itself, and copies its share of the one after: there is one barrier a tile. A warp has 16 channels; the two that share a
// scheduler have the same ones, and the tile's positions in turns of 16. One of them multiplies first, the other one copies and
// activates first, so that the matrix units are busy all the time. A pending gradient is finished in place then; what it is pending
// on is on its way to registers while the tile behind it is copied.
//
// Both operands have the summed positions as their rows, and are read transposed: a lane has the values of two neighbouring
// positions in one register. What the middle one of three taps needs is the later position for the left tap and the earlier one
// for the right tap, so it is not read.

#include <algorithm>

#include "conv_weight.cuh"
#include "matrix.cuh"
#include "stack.cuh"

namespace resdense::cuda {

// For 64 channels, 32 outputs and 224 positions, in clocks of a multiprocessor: 3,200 for the products at the rate of mma.sync
// (2,000 at that of wgmma); 2,800 for shared memory, of it 1,800 for reading fragments and 1,000 for copying and activating;
// 2,600 for the instructions, half of them to copy and to activate; 1,800 for 53 KB of the second-level cache, as the gradient
// comes again for every 64 channels and the halo for every tile. At the end 2,500 to write 72 KiB of sums: with 128 channels a
// block it would be twice that, and twice as much to add up, with 32 half; but then half of what is read would be gradients.
struct Conv3x3WeightTile {
  static constexpr int kThreads = 256;
  static constexpr int kChannels = 64, kOutputs = 32;
  static constexpr int kPositions = 224;  // 8 x 28, 16 x 14 or 28 x 8
  static constexpr int kHalo = 300;       // positions of the tile and around it, at most, in
  static constexpr int kRows = 32;        // rows
  static constexpr int kGroups = kChannels / 16, kWays = kThreads / 32 / kGroups;  // the warps': of channels, of positions
  static constexpr int kStages = 3;       // tiles in shared memory: multiplied, activated, copied
  static constexpr int kHaloPieces = kHalo * kChannels / 8;
  static constexpr int kRowsAt = kHaloPieces + kPositions * kOutputs / 8;  // the rows' addresses
  static constexpr int kStagePieces = kRowsAt + kRows * 2;
  static constexpr int64_t kBytes = int64_t(kStages) * kStagePieces * 16;

  // Where a 16-byte piece lies: those that ldmatrix reads at once, of eight rows, are in different banks.
  __device__ static int place(int row, int key, int piece) { return row * 8 + (piece ^ (key & 7)); }
  __device__ static int place_grad(int row, int piece) { return kHaloPieces + row * 4 + (piece ^ (row >> 1 & 3)); }
};

// Where a row of the halo lies in x, and a row of the tile in the gradient, in what that is pending on, and finished: addresses of
// its first column; 0 where there is none.
struct alignas(16) WeightRow {
  uint64_t x, grad, z, finished;
};

template <typename T>
struct Conv3x3Weight {
  const T *grad, *x;
  PendingGrad<T> pending;
  const float *scale, *shift;  // 16-byte aligned
  float* parts;  // [splits][outputs][3][3][channels]
  float slope;
  int64_t grad_sn, grad_ss, x_sn, x_ss;  // strides of sample and position
  int channels, outputs;
  int chunks, chunk_channels;            // of the channels, which the blocks of a split have side by side
  int splits;
  Stack stack;                           // of an even number of columns, at least 8
};

template <typename T, int M16>
__global__ void __launch_bounds__(Conv3x3WeightTile::kThreads)
    bn_act_conv3x3_weight_bwd_kernel(Conv3x3Weight<T> p) {
  start_kernel();
  using Tile = Conv3x3WeightTile;
  using Piece = Vector<T, 8>;
  using Four = Vector<float, 4>;
  constexpr int kHaloAtOnce = Tile::kThreads / 4, kGradsAtOnce = Tile::kThreads / 2;
  static_assert(Tile::kWays == 2 && Tile::kChannels == 64 && Tile::kOutputs == 32);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int group = warp % Tile::kGroups, way = warp / Tile::kGroups;
  const int split = blockIdx.x / p.chunks, chunk = blockIdx.x - split * p.chunks;
  const int first_channel = chunk * p.chunk_channels, end_channel = std::min(p.channels, first_channel + p.chunk_channels);
  const bool busy = first_channel + group * 16 < end_channel;

  const Stack& stack = p.stack;
  const int columns = stack.tile_columns, pitch = stack.pitch(), halo = stack.halo();
  const int positions = stack.tile_rows * columns, steps = (positions + 15) / 16;

  Piece* const s_stages = reinterpret_cast<Piece*>(dynamic_shared());

  // A lane for every row: at least 8 columns have at most 32 of them.
  const auto place_rows = [&](int tile, Piece* stage) {
    const int top = stack.by_strips.quotient(tile), left = (tile - top * stack.strips) * columns;
    const int row = top * stack.tile_rows + lane - 1;
    const auto address = [&](const T* map, int64_t sn, int64_t ss, int column) {
      return reinterpret_cast<uint64_t>(map) + (stack.offset(row, 0, sn, ss) + column * ss) * sizeof(T);
    };
    const bool in_halo = tile < stack.tiles && lane < stack.tile_rows + 2 && stack.offset(row, 0, 0, 0) == 0;
    const bool in_tile = in_halo && lane > 0 && lane <= stack.tile_rows, pends = in_tile && p.pending.z;
    const PendingGrad<T>& pending = p.pending;
    reinterpret_cast<WeightRow*>(stage + Tile::kRowsAt)[lane] = {
        in_halo ? address(p.x, p.x_sn, p.x_ss, left - 1) : 0, in_tile ? address(p.grad, p.grad_sn, p.grad_ss, left) : 0,
        pends ? address(pending.z, pending.z_sn, pending.z_ss, left) : 0,
        pends ? address(pending.finished, pending.finished_sn, pending.finished_ss, left) : 0};
  };

  // A thread copies the same two pieces of every kHaloAtOnce-th position of the halo, and of every kGradsAtOnce-th gradient;
  // zeros where there are none. Positions 4 apart are those of neighbouring threads, so that the pieces of eight threads lie in
  // different banks. A bit says of which positions there is something to activate, or to finish.
  const int copy_row = warp * 8 + lane / 8 + lane / 4 % 2 * 4, copy_piece = lane % 4;
  const int grad_row = warp * 16 + lane / 16 * 8 + lane / 2 % 2 + lane / 4 % 2 * 4 + lane / 8 % 2 * 2, grad_piece = lane % 2;
  const int copy_channel = first_channel + copy_piece * 8, second_channel = copy_channel + 32;
  const unsigned width = stack.width, none = 0;
  const unsigned x_width = copy_channel < end_channel ? width : none, second_width = second_channel < end_channel ? width : none;
  const unsigned grad_width = grad_piece * 8 < p.outputs ? width : none;
  const unsigned second_grad_width = grad_piece * 8 + 16 < p.outputs ? width : none;
  int strip = split % stack.strips;  // of the tile that is copied next
  constexpr int kGradBits = 16;  // the first of the gradient's
  const auto copy_tile = [&](int tile, Piece* stage) {
    uint32_t inside = 0;
    if (tile >= 0 && tile < stack.tiles) {
      const auto* const rows = reinterpret_cast<const WeightRow*>(stage + Tile::kRowsAt);
      const int left = strip * columns;
      strip += p.splits % stack.strips;
      if (strip >= stack.strips) strip -= stack.strips;
      uint32_t bit = 1;
#pragma unroll 1
      for (int at = copy_row; at < halo; at += kHaloAtOnce, bit *= 2) {
        const int row = stack.by_pitch.quotient(at), column = at - row * pitch;
        const uint64_t first = rows[row].x, from = first + (column * p.x_ss + copy_channel) * sizeof(T);
        const unsigned x = first == 0 ? ~0u : left - 1u + column;
        const int place = Tile::place(at, at - 2 * row, copy_piece);
        copy_16_bytes(stage + place, reinterpret_cast<const T*>(from), x < x_width);
        copy_16_bytes(stage + (place ^ 4), reinterpret_cast<const T*>(from + 64), x < second_width);
        if (x < x_width) inside |= bit;
      }
      bit = 1u << kGradBits;
#pragma unroll 1
      for (int at = grad_row; at < steps * 16; at += kGradsAtOnce, bit *= 2) {
        const int row = stack.by_columns.quotient(at), column = at - row * columns;
        const uint64_t first = rows[row + 1].grad, from = first + (column * p.grad_ss + grad_piece * 8) * sizeof(T);
        const unsigned x = first == 0 ? ~0u : unsigned(left + column);
        const int place = Tile::place_grad(at, grad_piece);
        copy_16_bytes(stage + place, reinterpret_cast<const T*>(from), x < grad_width);
        copy_16_bytes(stage + (place ^ 2), reinterpret_cast<const T*>(from + 32), x < second_grad_width);
        if (x < grad_width) inside |= bit;
      }
    }
    commit_copies();
    return inside;
  };

  const auto activate_tile = [&](Piece* stage, uint32_t inside, float slope) {
    if (inside << kGradBits == 0) return;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int channel = half == 0 ? copy_channel : second_channel;
      if (channel >= end_channel) break;
      float scale[8], shift[8];
      load_neighbours(p.scale + channel, 8, scale);
      load_neighbours(p.shift + channel, 8, shift);
      uint32_t left = inside;
#pragma unroll 2
      for (int at = copy_row; at < halo; at += kHaloAtOnce, left >>= 1) {
        using Words = Vector<uint32_t, 4>;
        const int place = Tile::place(at, at - 2 * stack.by_pitch.quotient(at), copy_piece) ^ half * 4;
        Words words = reinterpret_cast<const Words&>(stage[place]);
#pragma unroll
        for (int k = 0; k < 4; ++k)
          words.v[k] = activate_pair<T>(words.v[k], {scale[2 * k], scale[2 * k + 1]}, {shift[2 * k], shift[2 * k + 1]}, slope);
        if (left & 1) reinterpret_cast<Words&>(stage[place]) = words;
      }
    }
  };

  // Of this thread's gradients: what they are pending on, and then themselves.
  static_assert(Tile::kPositions <= 2 * kGradsAtOnce);
  const auto each_grad = [&](const Piece* stage, uint32_t inside, auto f) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!(inside >> (kGradBits + i) & 1)) continue;
      const int at = grad_row + i * kGradsAtOnce, row = stack.by_columns.quotient(at);
      const WeightRow& rows = reinterpret_cast<const WeightRow*>(stage + Tile::kRowsAt)[row + 1];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (half == 0 || second_grad_width > 0) f(i, half, rows, at, at - row * columns, grad_piece * 8 + half * 16);
    }
  };
  const auto load_pending = [&](const Piece* stage, uint32_t inside, Piece(&z)[2][2]) {
    each_grad(stage, inside, [&](int i, int half, const WeightRow& rows, int, int column, int channel) {
      z[i][half] = load<T, 8>(reinterpret_cast<const T*>(rows.z) + (column * p.pending.z_ss + channel));
    });
  };
  const auto finish_tile = [&](Piece* stage, uint32_t inside, const Piece(&z)[2][2]) {
    each_grad(stage, inside, [&](int i, int half, const WeightRow& rows, int at, int column, int channel) {
      Piece& piece = stage[Tile::place_grad(at, grad_piece) ^ half * 2];
      piece = p.pending.finish(piece, z[i][half], channel);
      if (chunk == 0) store(reinterpret_cast<T*>(rows.finished) + (column * p.pending.finished_ss + channel), piece);
    });
  };

  // What this lane brings to ldmatrix, in bytes: of the gradients, and for the left and the right tap of every row of taps.
  int load_grad[M16], load_x[3][2];
#pragma unroll
  for (int m = 0; m < M16; ++m) load_grad[m] = Tile::place_grad(lane % 8 + lane / 16 * 8, m * 2 + lane / 8 % 2) * 16;
#pragma unroll
  for (int dy = 0; dy < 3; ++dy)
#pragma unroll
    for (int j = 0; j < 2; ++j)
      load_x[dy][j] = Tile::place(dy * pitch + 2 * j, lane + dy * columns + 2 * j, group * 2 + lane / 16) * 16;

  float sums[kConvTaps][M16][2][4] = {};
  const auto multiply_tile = [&](const Piece* stage) {
    const auto* const bytes = reinterpret_cast<const unsigned char*>(stage);
    const auto load_a = [&](uint32_t(&a)[4], int m, int k) {
      load_matrices_transposed(a, bytes + load_grad[m] + k * (16 * 4 * 16));
    };
    // Positions past the end have gradients of 0, and take their values from some that exist, of the same key. (An infinite
    // value or NaN makes NaN of them, as of positions of padding beside it: of all taps of its channel, where in stock some
    // may not meet it. So may such a gradient at a border make NaN of all taps of its output.)
    const auto place_x = [&](int k) {
      const int q = k * 16 + lane % 16, position = q < positions ? q : lane % 8;
      return (position + 2 * stack.by_columns.quotient(position)) * (8 * 16);
    };
    // Upper and lower positions of the first eight channels are 0 and 1, of the others 2 and 3.
    const auto load_b = [&](uint32_t(&b)[2][4], int dy, int x) {
      load_matrices_transposed(b[0], bytes + load_x[dy][0] + x);
      load_matrices_transposed(b[1], bytes + load_x[dy][1] + x);
    };

    // What is multiplied next is always on its way.
    uint32_t a[M16][4], b[2][4];
    int x = place_x(way);
#pragma unroll
    for (int m = 0; m < M16; ++m) load_a(a[m], m, way);
    load_b(b, 0, x);
#pragma unroll 1
    for (int k = way; k < steps; k += Tile::kWays) {
      const int next = k + Tile::kWays < steps ? k + Tile::kWays : k, next_x = place_x(next);
#pragma unroll
      for (int dy = 0; dy < 3; ++dy) {
        uint32_t taps[3][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) taps[0][i] = b[0][i], taps[1][i] = b[0][i] >> 16 | b[1][i] << 16, taps[2][i] = b[1][i];
        load_b(b, (dy + 1) % 3, dy < 2 ? x : next_x);
#pragma unroll
        for (int m = 0; m < M16; ++m) {
#pragma unroll
          for (int dx = 0; dx < 3; ++dx) {
            multiply_add(sums[dy * 3 + dx][m][0], a[m], taps[dx][0], taps[dx][1], T{});
            multiply_add(sums[dy * 3 + dx][m][1], a[m], taps[dx][2], taps[dx][3], T{});
          }
          if (dy == 2) load_a(a[m], m, next);
        }
      }
      x = next_x;
    }
  };

  // The first three rounds have less to do.
  uint32_t inside = 0, inside_next = 0;
  int now = 0, next = Tile::kStagePieces, after = 2 * Tile::kStagePieces;
  for (int tile = split - 3 * p.splits; tile < stack.tiles; tile += p.splits) {
    __syncthreads();  // the tile is there, and all are done with the one before
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      if (turn == way) {
        if (busy && tile >= 0) multiply_tile(s_stages + now);
        continue;
      }
      if (warp == 0) place_rows(tile + 3 * p.splits, s_stages + now);
      inside = inside_next;
      Piece z[2][2];
      if (p.pending.z) load_pending(s_stages + next, inside, z);
      inside_next = copy_tile(tile + 2 * p.splits, s_stages + after);
      wait_for_copies<1>();
      if (p.pending.z) finish_tile(s_stages + next, inside, z);
      // With a slope that the compiler knows the ReLU is part of the rounding.
      if (p.slope == 0)
        activate_tile(s_stages + next, inside, 0);
      else
        activate_tile(s_stages + next, inside, p.slope);
    }
    const int free = now;
    now = next, next = after, after = free;
  }

  // The sums of both ways, in shared memory fragment by fragment.
  Four* const s_sums = reinterpret_cast<Four*>(s_stages) + thread % (Tile::kGroups * 32);
  const auto s_sum = [&](int tap, int m, int n) -> Four& { return s_sums[((tap * M16 + m) * 2 + n) * (Tile::kGroups * 32)]; };
  static_assert(kConvTaps * M16 * 2 * Tile::kGroups * 32 * sizeof(Four) <= Tile::kBytes);
  __syncthreads();
  if (way == 1) {
#pragma unroll
    for (int tap = 0; tap < kConvTaps; ++tap)
#pragma unroll
      for (int m = 0; m < M16; ++m)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const auto& mine = sums[tap][m][n];
          s_sum(tap, m, n) = {mine[0], mine[1], mine[2], mine[3]};
        }
  }
  __syncthreads();
  if (way == 1) return;
  float* const part = p.parts + int64_t(split) * p.outputs * kConvTaps * p.channels;
#pragma unroll
  for (int tap = 0; tap < kConvTaps; ++tap) {
#pragma unroll
    for (int m = 0; m < M16; ++m) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int channel = first_channel + group * 16 + n * 8 + lane % 4 * 2;
        const auto& mine = sums[tap][m][n];
        const Four other = s_sum(tap, m, n);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int output = m * 16 + half * 8 + lane / 4;
          if (output < p.outputs && channel < end_channel)
            store<float, 2>(part + (output * kConvTaps + tap) * p.channels + channel,
                            {mine[2 * half] + other.v[2 * half], mine[2 * half + 1] + other.v[2 * half + 1]});
        }
      }
    }
  }
}

}  // namespace resdense::cuda
