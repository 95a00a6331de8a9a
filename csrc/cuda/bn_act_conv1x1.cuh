#pragma once
// A 1x1 convolution of act(scale * x + shift), channels-last: a product of matrices whose left one is activated in
// registers, on its way from shared memory to the matrix units.
//
// A tile is some positions with all outputs. A block takes every gridDim.x-th tile, and the channels in chunks. The
// copies of the chunks to come are under way while one is multiplied, across tiles as well, so that memory is never
// idle: neither at the barrier that ends a chunk nor while the products of a tile are written.

#include <algorithm>

#include "conv.cuh"
#include "matrix.cuh"

namespace resdense::cuda {

constexpr int kConv1x1Chunk = 64;  // channels: rows of 128 bytes
constexpr int kConv1x1Threads = 256;
constexpr int kConv1x1Across = 2;  // warps that share a tile's outputs; the others share its positions
constexpr int kConv1x1Down = kConv1x1Threads / 32 / kConv1x1Across;

// For C -> 128 channels 128 positions cost, in clocks of a multiprocessor of an H100: 13.8 C for the bytes of the input
// and 1,800 for those of the output; 12.6 C for products at the rate of mma.sync; of shared memory 8 C for reading
// fragments, with 64 x 64 products a warp, and 3 C for writing them; 10 C to issue instructions, half of these for
// activating every value twice, once for each of the warps across, and 1,200 to finish. From the L2 cache, of which a
// multiprocessor gets some 28 bytes a clock, the input takes 9 C and the weights, which come anew for every tile, 4.6 C
// with tiles of 256 positions; with 128 it would be 9 C, more than there is time for. Hence large tiles, and one block
// a multiprocessor, whose copies go on while it finishes a tile. Small ones, of 64 positions, are for maps that do not
// fill the device.
template <int OUTPUTS, bool LARGE>
struct Conv1x1Tile {
  static constexpr int kM16 = !LARGE ? 1 : OUTPUTS <= 128 ? 4 : 3;  // a warp's products: 16 kM16 positions
  static constexpr int kN8 = OUTPUTS / kConv1x1Across / 8;          // by 8 kN8 outputs
  static constexpr int kPositions = 16 * kM16 * kConv1x1Down;
  static constexpr int kStages = LARGE ? 3 : 4;                     // chunks in shared memory
  static constexpr int kBlocks = LARGE || OUTPUTS > 128 ? 1 : 2;    // a multiprocessor

  // Shared memory, in bytes: of every stage x and weight, scale and shift; and the moments of what the warps down have
  // written.
  static constexpr int kRows = kPositions + OUTPUTS;
  static constexpr int kStage = kRows * kConv1x1Chunk * 2 + 2 * kConv1x1Chunk * 4;
  static constexpr int kPart = 1 + 2 * OUTPUTS;
  static constexpr int kBytes = kStages * kStage + kConv1x1Down * kPart * 4;
};

template <typename T>
struct Conv1x1 {
  const T* x;
  const float *scale, *shift;
  const T* weight;  // [outputs][channels]
  T* out;
  float slope;
  int64_t x_ss, out_ss;  // strides of position
  int positions, channels, outputs, tiles;
  float* parts;  // count, means and m2 that a block leaves; none where there are no statistics
};

template <typename T, int OUTPUTS, bool LARGE>
__global__ void __launch_bounds__(kConv1x1Threads, Conv1x1Tile<OUTPUTS, LARGE>::kBlocks)
    bn_act_conv1x1_fwd_kernel(Conv1x1<T> p) {
  start_kernel();
  using Tile = Conv1x1Tile<OUTPUTS, LARGE>;
  using Piece = Vector<T, 8>;
  constexpr int kPieces = kConv1x1Chunk / 8;
  constexpr int kRowsAtOnce = kConv1x1Threads / kPieces;
  static_assert(kPieces == 8 && Tile::kPositions % kRowsAtOnce == 0 && OUTPUTS % kRowsAtOnce == 0);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int down = warp % kConv1x1Down, across = warp / kConv1x1Down;
  const int chunks = (p.channels + kConv1x1Chunk - 1) / kConv1x1Chunk;

  // A chunk of a tile, and where its copy lies.
  struct Step {
    int tile, chunk = 0, stage = 0;
  };
  const auto advance = [&](Step& step) {
    if (++step.stage == Tile::kStages) step.stage = 0;
    if (++step.chunk == chunks) step.chunk = 0, step.tile += gridDim.x;
  };
  const auto at_stage = [](int stage) { return reinterpret_cast<Piece*>(dynamic_shared() + stage * Tile::kStage); };
  const auto coefficients = [](Piece* stage) { return reinterpret_cast<float*>(stage + Tile::kRows * kPieces); };

  // A thread copies the same piece of every kRowsAtOnce-th row: of positions, then of outputs.
  const int piece = thread % kPieces, first = thread / kPieces;
  const auto copy = [&](const Step& step) {
    Piece* const stage = at_stage(step.stage);
    Piece* to = stage + place_in_rows(first, piece);
    const int channel = step.chunk * kConv1x1Chunk + piece * 8;
    const auto copy_rows = [&](const T* from, int64_t stride, int count, int rows) {
#pragma unroll
      for (int i = 0; i < rows; i += kRowsAtOnce) {
        copy_16_bytes(to, from, i < count);
        to += kRowsAtOnce * kPieces, from += kRowsAtOnce * stride;
      }
    };
    // How many of the rows from this thread's first on are there to be read.
    const bool inside = channel < p.channels;
    const int position = step.tile * Tile::kPositions + first;
    copy_rows(p.x + position * p.x_ss + channel, p.x_ss, inside ? p.positions - position : 0, Tile::kPositions);
    copy_rows(p.weight + (first * p.channels + channel), p.channels, inside ? p.outputs - first : 0, OUTPUTS);
    if (thread < kConv1x1Chunk / 4) {
      const int at = step.chunk * kConv1x1Chunk + thread * 4;
      copy_16_bytes(coefficients(stage) + thread * 4, p.scale + at, at < p.channels);
      copy_16_bytes(coefficients(stage) + kConv1x1Chunk + thread * 4, p.shift + at, at < p.channels);
    }
  };

  float products[Tile::kM16][Tile::kN8][4];
  const auto multiply = [&](Piece* stage, float slope) {
    const Piece* const x = stage + down * Tile::kM16 * 16 * kPieces;
    const Piece* const weight = stage + (Tile::kPositions + across * Tile::kN8 * 8) * kPieces;
    const int x_place = place_in_rows(lane % 16, lane / 16);
    const int weight_place = place_in_rows(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const float* const scale = coefficients(stage) + lane % 4 * 2;
    const float* const shift = scale + kConv1x1Chunk;
#pragma unroll
    for (int k = 0; k < kPieces; k += 2) {
      // Of either piece a lane has two channels.
      Vector<float, 2> scales[2], shifts[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scales[half] = load<float, 2>(scale + (k + half) * 8);
        shifts[half] = load<float, 2>(shift + (k + half) * 8);
      }
      uint32_t a[Tile::kM16][4];
#pragma unroll
      for (int m = 0; m < Tile::kM16; ++m) {
        load_matrices(a[m], x + m * 16 * kPieces + (x_place ^ k));
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = activate_pair<T>(a[m][i], scales[i / 2], shifts[i / 2], slope);
      }
#pragma unroll
      for (int n = 0; n < Tile::kN8; n += 2) {
        uint32_t b[4];
        load_matrices(b, weight + n * 8 * kPieces + (weight_place ^ k));
#pragma unroll
        for (int m = 0; m < Tile::kM16; ++m) {
          multiply_add(products[m][n], a[m], b[0], b[1], T{});
          multiply_add(products[m][n + 1], a[m], b[2], b[3], T{});
        }
      }
    }
  };

  // The moments of what the warp has written. A lane keeps those of a few channels, what merge_halves leaves to it, in
  // shared memory: between tiles, registers are for the products.
  float* const gathered = reinterpret_cast<float*>(dynamic_shared() + Tile::kStages * Tile::kStage);
  float* const part = gathered + down * Tile::kPart;
  float positions = 0;
  const auto gather = [&](const Moments<float, Tile::kN8 / 4>& more) {
    Moments<float, Tile::kN8 / 4> all;
    const auto each = [&](auto f) {
#pragma unroll
      for (int j = 0; j < all.kChannels; ++j) {
        const int k = lane / 4 * all.kChannels + j;
        float* const mean = part + 1 + across * Tile::kN8 * 8 + k / 2 * 8 + lane % 4 * 2 + k % 2;
        f(j, mean, mean + OUTPUTS);
      }
    };
    all.count = positions;
    if (positions != 0) each([&](int j, const float* mean, const float* m2) { all.mean[j] = *mean, all.m2[j] = *m2; });
    all.merge(more);
    each([&](int j, float* mean, float* m2) { all.put(j, mean, m2); });
    positions = all.count;
  };

  // Rounds the products, writes them, and gathers their moments.
  const auto finish = [&](int tile) {
    const int position = tile * Tile::kPositions + down * Tile::kM16 * 16 + lane / 4;
    const int channel = across * Tile::kN8 * 8 + written_channel();
    T* const out = p.out + position * p.out_ss + channel;
    uint32_t rounded[2 * Tile::kM16][Tile::kN8];
    int rows = 0;
#pragma unroll
    for (int i = 0; i < 2 * Tile::kM16; ++i) {
      const bool exists = position + i * 8 < p.positions;
      rows += exists;
#pragma unroll
      for (int n = 0; n < Tile::kN8; n += 2) {
#pragma unroll
        for (int j = n; j < n + 2; ++j) rounded[i][j] = round_products<T>(products[i / 2][j], i);
        const auto four = swap_pairs(rounded[i][n], rounded[i][n + 1]);
        if (exists && channel + n * 8 < p.outputs)
          store(reinterpret_cast<uint32_t*>(out + i * 8 * p.out_ss + n * 8), four);
      }
    }
    if (p.parts == nullptr) return;
    const float count = static_cast<float>(rows), inverse = 1 / std::max(count, 1.0f);
    const auto half = merge_halves<2 * Tile::kN8>(count, 16, [&](int k, float& mean, float& m2) {
      channel_moments<T>(rounded, k, rows, inverse, mean, m2);
    });
    gather(merge_halves(merge_halves(half, 8), 4));
  };

  Step ahead{int(blockIdx.x)}, step = ahead;
  const auto copy_ahead = [&] {
    if (ahead.tile < p.tiles) copy(ahead);
    commit_copies();
    advance(ahead);
  };
  for (int i = 1; i < Tile::kStages; ++i) copy_ahead();
  while (step.tile < p.tiles) {
    wait_for_copies<Tile::kStages - 2>();
    __syncthreads();  // the chunk is there, and all are done with the one before, whose place the next copy takes
    copy_ahead();
    if (step.chunk == 0) {
#pragma unroll
      for (auto& of_positions : products)
#pragma unroll
        for (auto& of_outputs : of_positions)
#pragma unroll
          for (float& product : of_outputs) product = 0;
    }
    // With a slope that the compiler knows the ReLU is part of the rounding.
    if (p.slope == 0)
      multiply(at_stage(step.stage), 0);
    else
      multiply(at_stage(step.stage), p.slope);
    if (step.chunk + 1 == chunks) finish(step.tile);
    advance(step);
  }
  if (p.parts == nullptr) return;

  if (lane == 0 && across == 0) part[0] = positions;
  __syncthreads();
  leave_moments<OUTPUTS>(gathered, kConv1x1Down, p.outputs, p.parts);
}

}  // namespace resdense::cuda
