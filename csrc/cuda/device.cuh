#pragma once
// What every kernel shares. Kernels (.cuh) use neither launch syntax nor torch, so that tests can compile them as plain
// C++ against an execution-model shim; launchers (.cu) do the rest.

#ifdef RESDENSE_SHIM
#include "shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <bit>
#include <cstdint>

namespace resdense::cuda {

// What every kernel does first. From Hopper on one is started while those before it still run: it waits here until they have
// ended and what they have written is there, and lets the next one be started. So launches cost a chain of short kernels less.
__device__ inline void start_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// threadIdx.x for what a kernel does last, where the one that it began with would take a register all along.
__device__ inline int thread_read_anew() {
#ifdef __CUDA_ARCH__
  int thread;
  asm volatile("mov.u32 %0, %tid.x;" : "=r"(thread));
  return thread;
#else
  return threadIdx.x;
#endif
}

// Whether this is compiled for Blackwell, whose arithmetic on pairs of float32 wants them side by side: that takes more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

// n / divisor for 0 <= n < 2^31, as a product: with 2^shift >= divisor the multiplier is too large by less than 2^-31 of itself.
struct Divisor {
  uint32_t multiplier;
  int shift;

  explicit Divisor(int divisor) : shift(31 + std::bit_width(static_cast<uint32_t>(divisor - 1))) {
    multiplier = static_cast<uint32_t>(((uint64_t(1) << shift) + divisor - 1) / divisor);
  }

  __device__ int quotient(int n) const { return static_cast<int>(uint64_t(n) * multiplier >> shift); }
};

// The type that a value is computed in, and its sums are kept in.
template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <typename T>
using wide_t = typename Wide<T>::type;

__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ inline void narrow(float v, float& to) { to = v; }
__device__ inline void narrow(double v, double& to) { to = v; }
__device__ inline void narrow(float v, __half& to) { to = __float2half_rn(v); }
__device__ inline void narrow(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }

// Of 16 bits two are rounded by one instruction, and lie in one register then.
__device__ inline __half2 narrow_pair(float a, float b, __half) { return __floats2half2_rn(a, b); }
__device__ inline __nv_bfloat162 narrow_pair(float a, float b, __nv_bfloat16) { return __floats2bfloat162_rn(a, b); }

// 16 bytes, the widest access that all supported architectures have.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Vector {
  T v[VEC];
};

// VEC neighbouring values at an address that is aligned to them.
template <typename T, int VEC>
__device__ inline Vector<T, VEC> load(const T* from) {
  return *reinterpret_cast<const Vector<T, VEC>*>(from);
}

template <typename T, int VEC>
__device__ inline void store(T* to, const Vector<T, VEC>& from) {
  *reinterpret_cast<Vector<T, VEC>*>(to) = from;
}

template <typename T, typename W, int VEC>
__device__ inline Vector<T, VEC> narrow(const W (&from)[VEC]) {
  Vector<T, VEC> result;
  if constexpr (sizeof(T) == 2 && VEC % 2 == 0) {
#pragma unroll
    for (int k = 0; k < VEC; k += 2) {
      const auto pair = narrow_pair(from[k], from[k + 1], T{});
      result.v[k] = pair.x, result.v[k + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int k = 0; k < VEC; ++k) narrow(from[k], result.v[k]);
  }
  return result;
}

// The first `count` values of a vector, and 0 for the others: all at once where all are wanted.
template <typename T, int VEC>
__device__ inline Vector<T, VEC> load_first(const T* from, int count) {
  if (count == VEC) return load<T, VEC>(from);
  Vector<T, VEC> result;
#pragma unroll
  for (int k = 0; k < VEC; ++k) result.v[k] = k < count ? from[k] : T{};
  return result;
}

template <typename T, int VEC>
__device__ inline void store_first(T* to, const Vector<T, VEC>& from, int count) {
  if (count == VEC) return store<T, VEC>(to, from);
#pragma unroll
  for (int k = 0; k < VEC; ++k)
    if (k < count) to[k] = from.v[k];
}

// `count` neighbouring values, and 0 for the others: 16 bytes at a time where their address allows it.
template <typename W, int K>
__device__ inline void load_neighbours(const W* from, int count, W (&to)[K]) {
  constexpr int VEC = K < kVector<W> ? 1 : kVector<W>;
  if (VEC > 1 && count == K && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
#pragma unroll
    for (int k = 0; k < K; k += VEC) {
      const auto values = load<W, VEC>(from + k);
#pragma unroll
      for (int j = 0; j < VEC; ++j) to[k + j] = values.v[j];
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < K; ++k) to[k] = k < count ? from[k] : W(0);
}

// act(y) = y for y > 0, else slope * y. NaN stays NaN, and the ReLU of -inf is 0, which 0 * -inf is not.
template <typename W>
__device__ inline W activate(W y, W slope) {
  if (y > W(0) || y != y) return y;
  return slope == W(0) ? W(0) : slope * y;
}

// The two 16-bit values of a word. (A bfloat16 is the upper half of a float: one instruction each.)
__device__ inline Vector<float, 2> widen_pair(uint32_t word, __nv_bfloat16) {
  return {std::bit_cast<float>(word << 16), std::bit_cast<float>(word & 0xffff0000u)};
}
__device__ inline Vector<float, 2> widen_pair(uint32_t word, __half) {
  const auto pair = std::bit_cast<Vector<__half, 2>>(word);
  return {widen(pair.v[0]), widen(pair.v[1])};
}

template <typename T>
__device__ inline uint32_t narrow_word(const Vector<float, 2>& pair) {
  return std::bit_cast<uint32_t>(narrow<T>(pair.v));
}

template <typename T>
__device__ inline uint32_t activate_pair(uint32_t word, const Vector<float, 2>& scale, const Vector<float, 2>& shift,
                                         float slope) {
  Vector<float, 2> y = widen_pair(word, T{});
#pragma unroll
  for (int k = 0; k < 2; ++k) y.v[k] = activate(scale.v[k] * y.v[k] + shift.v[k], slope);
  return narrow_word<T>(y);
}

// grad * act'(y), from y or from act(y), which for slope >= 0 lie on the same side of 0. At NaN as torch has it.
template <typename W>
__device__ inline W activate_backward(W grad, W y, W slope) {
  if (slope == W(0)) return y <= W(0) ? W(0) : grad;
  return y > W(0) ? grad : slope * grad;
}

// Count, mean and sum of squared deviations of K channels with one count: what merges exactly (Chan, Golub and LeVeque,
// 1983), whatever the mean.
template <typename W, int K>
struct Moments {
  using Value = W;
  static constexpr int kChannels = K;
  W count = 0;
  W mean[K] = {}, m2[K] = {};

  // f(k, mean, m2) sets the mean and m2 of the k-th channel of what is merged.
  template <typename F>
  __device__ void merge(W other_count, F f) {
    if (other_count == W(0)) return;
    const W total = count + other_count;
    const W share = other_count / total;
    const W weight = count * share;
    count = total;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      W other_mean, other_m2;
      f(k, other_mean, other_m2);
      const W delta = other_mean - mean[k];
      mean[k] += delta * share;
      m2[k] += other_m2 + delta * delta * weight;
    }
  }

  __device__ void merge(const Moments& other) {
    merge(other.count, [&](int k, W& a, W& b) { a = other.mean[k], b = other.m2[k]; });
  }

  __device__ void merge(W other_count, W other_mean, W other_m2) {
    static_assert(K == 1);
    merge(other_count, [=](int, W& a, W& b) { a = other_mean, b = other_m2; });
  }

  // All K as one channel's.
  __device__ Moments<W, 1> folded() const {
    Moments<W, 1> all;
#pragma unroll
    for (int k = 0; k < K; ++k) all.merge(count, mean[k], m2[k]);
    return all;
  }

  __device__ void put(int k, W* to_mean, W* to_m2) const {
    *to_mean = mean[k];
    *to_m2 = m2[k];
  }
};

}  // namespace resdense::cuda
