#pragma once
// What the data gradients of convolutions of act(scale * x + shift) share. A warp multiplies the gradients of 16 positions at
// a time by the weights of kDataChannels of the input's channels, which stay in its registers, as fragments. The columns of
// the products are permuted so that a lane has 8 neighbouring channels: of two positions all that is read, written and summed
// of them is its own.

#include <bit>

#include "bn_act.cuh"
#include "fold.cuh"
#include "matrix.cuh"
#include "splits.cuh"

namespace resdense::cuda {

constexpr int kDataPositions = 16;  // of a product
constexpr int kDataChannels = 32;   // of a warp
constexpr int kDataColumns = kDataChannels / 8;
constexpr int kDataMap = kDataPositions * kDataColumns;  // the 16-byte pieces that a warp has of a map for a product
// The products after which a warp leaves its sums: a lane adds up two positions of each, and a longer chain loses digits.
constexpr int kDataChain = 32;

// The weights of 16 outputs, from the first of which on there are `outputs`, in rows of `stride` values; 0 where there are none.
// Column c of the j-th product of 8 columns is the warp's channel c / 2 * 8 + 2 * j + c % 2: those that a lane has of all four
// are neighbours. A fragment takes one channel of the rows of two outputs, and 16 bytes of such a row have one for each of the
// products, for each of two lanes: one loads them of the one row, one of the other, and they exchange what they have.
// `first` is where the first output has the eight channels of which the lane has one.
template <typename T>
__device__ inline void load_data_weights(const T* weight, unsigned first, unsigned stride, int outputs,
                                         uint32_t (&to)[kDataColumns][2]) {
  const int lane = threadIdx.x % 32, odd = lane / 4 % 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int output = half * 8 + lane % 4 * 2 + odd;
    Vector<uint32_t, 4> words = {};
    const T* const from = weight + (first + output * stride);
    if (output < outputs) words = load<uint32_t, 4>(reinterpret_cast<const uint32_t*>(from));
#pragma unroll
    for (int j = 0; j < kDataColumns; ++j) {
      const uint32_t others = __shfl_xor_sync(0xffffffffu, words.v[j], 4);
      // The lower halves of both words, or the upper, the even row's first.
      to[j][half] = __byte_perm(words.v[j], others, odd ? 0x3276 : 0x5410);
    }
  }
}

// The first of those eight channels, of the warp's.
__device__ inline int data_weight_channel() { return threadIdx.x % 32 / 8 * 8; }

// Of 8 channels.
struct alignas(16) DataCoefficients {
  float scale[8], shift[8], center[8];

  // Those from `channel` on, or 0 where there are none.
  __device__ void load(const float* all_scale, const float* all_shift, const float* all_center, int channel, bool exist) {
    load_neighbours(all_scale + channel, exist ? 8 : 0, scale);
    load_neighbours(all_shift + channel, exist ? 8 : 0, shift);
    load_neighbours(all_center + channel, exist ? 8 : 0, center);
  }
};

// What a lane adds up of its 8 channels.
struct DataSums {
  Sums<float, 8> sums;

  // What is to be written to the upper or the lower (`half`) of the lane's two positions. `from` is x there, in shared memory,
  // and kDataMap pieces behind it what the map has had there, to ACCUMULATE.
  template <bool ACCUMULATE, typename T>
  __device__ Vector<T, 8> mask(const float (&product)[kDataColumns][4], int half, const Vector<T, 8>* from,
                               const DataCoefficients& c, float slope) {
    using Words = Vector<uint32_t, 4>;
    const Words x = std::bit_cast<Words>(from[0]), before = std::bit_cast<Words>(from[ACCUMULATE * kDataMap]);
    float result[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float value = widen_pair(x.v[k / 2], T{}).v[k % 2], was = widen_pair(before.v[k / 2], T{}).v[k % 2];
      result[k] = mask_value<ACCUMULATE>(product[k / 2][half * 2 + k % 2], value, was, c.scale[k], c.shift[k], c.center[k],
                                         Slope<float>{slope}, k, sums);
    }
    return narrow<T>(result);
  }

  template <typename T>
  __device__ Vector<T, 8> mask(const float (&product)[kDataColumns][4], int half, const Vector<T, 8>* from,
                               const DataCoefficients& c, float slope, bool accumulate) {
    return accumulate ? mask<true>(product, half, from, c, slope) : mask<false>(product, half, from, c, slope);
  }

  // Adds up the sums of the lanes that have the same channels, and leaves them.
  __device__ void leave(bool live, float* sum_dy, float* sum_dy_xc) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
#pragma unroll
      for (int other = 4; other < 32; other *= 2)
        sums.add(k, __shfl_xor_sync(0xffffffffu, sums.a[k], other), __shfl_xor_sync(0xffffffffu, sums.b[k], other));
      if (live && threadIdx.x % 32 < 4) sums.put(k, sum_dy + k, sum_dy_xc + k);
    }
    sums = {};
  }
};

// What the second stage makes of a channel's sums.
struct CorrectData {
  Correction<float> correct;
  float* dbeta;

  __device__ void operator()(int64_t channel, const Sums<float, 1>& all) const {
    dbeta[channel] = all.a[0];
    correct(channel, all.a[0], all.b[0]);
  }
};

// The second stage of a convolution's backward: of the weight's gradient, by the first `split_blocks`, and of the channels' sums.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    conv_backward_finish_kernel(Splits<T> splits, int split_blocks, Chunks<Sums<float, 1>> sums, CorrectData correct) {
  start_kernel();
  static_assert(kReduceThreads == kSplitWarps * 32);
  const int block = blockIdx.x;
  if (block < split_blocks)
    splits.add_up(block);
  else
    sums.merge(block - split_blocks, correct);
}

}  // namespace resdense::cuda
