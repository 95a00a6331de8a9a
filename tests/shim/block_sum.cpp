// Kernels with known bugs, to show that the shim and the sanitizers catch them. A program: `block_sum VARIANT ORDER` prints
// the sum of every block, for the variants right, no_barrier and out_of_bounds.

#include "shim.h"

#include <cstdio>
#include <cstdlib>
#include <string>

namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 3;

// The sum of a block's values. BEYOND is by how much the result misses its place.
template <bool BARRIER, int BEYOND>
__global__ void block_sum_kernel(const float* x, float* sums) {
  __shared__ float s[kThreads];
  const unsigned thread = threadIdx.x;
  s[thread] = x[blockIdx.x * kThreads + thread];
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (BARRIER) __syncthreads();
    if (thread < half) s[thread] += s[thread + half];
  }
  if (thread == 0) sums[blockIdx.x + BEYOND] = s[0];
}

}  // namespace

int main(int, char** arguments) {
  const std::string variant = arguments[1];
  shim::order = std::atoi(arguments[2]);
  // Whole numbers, of which float sums are exact in any order.
  std::vector<float> x(kBlocks * kThreads), sums(kBlocks);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);

  const auto kernel = variant == "right"        ? block_sum_kernel<true, 0>
                      : variant == "no_barrier" ? block_sum_kernel<false, 0>
                                                : block_sum_kernel<true, 1>;
  shim::launch(kBlocks, kThreads, [&] { kernel(x.data(), sums.data()); });
  for (const float sum : sums) std::printf("%.0f\n", sum);
}
