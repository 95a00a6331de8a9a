#pragma once
// Stands in for the device half of csrc/cuda/matrix.cuh: what the PTX manual says of the instructions, lane by lane.

namespace resdense::cuda {

inline unsigned char* dynamic_shared() { return shim::Block::shared(); }

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  struct alignas(16) Row {
    uint32_t words[4];
  };
  const auto rows = shim::Block::exchange(*static_cast<const Row*>(row));
  const unsigned lane = threadIdx.x % 32;
  for (unsigned matrix = 0; matrix < 4; ++matrix) to[matrix] = rows(8 * matrix + lane / 4).words[lane % 4];
}

inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  struct alignas(16) Row {
    uint16_t values[8];
  };
  const auto rows = shim::Block::exchange(*static_cast<const Row*>(row));
  const unsigned lane = threadIdx.x % 32;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    const unsigned first = 8 * matrix + 2 * (lane % 4);
    to[matrix] = rows(first).values[lane / 4] | uint32_t(rows(first + 1).values[lane / 4]) << 16;
  }
}

template <typename T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  struct Fragments {
    T a[4][2], b[2][2];
  } mine;
  static_assert(sizeof mine == 24);
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b[0], &b0, sizeof b0);
  std::memcpy(mine.b[1], &b1, sizeof b1);
  const auto fragments = shim::Block::exchange(mine);
  const unsigned lane = threadIdx.x % 32;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4, lower = i / 2, column = 2 * (lane % 4) + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned half = k / 8, owner = k % 8 / 2;
      const float left = fragments(4 * row + owner).a[2 * half + lower][k % 2];
      const float right = fragments(4 * column + owner).b[half][k % 2];
      c[i] += left * right;
    }
  }
}

inline void copy_16_bytes(void* to, const void* from, bool exists) { shim::Block::copy(to, exists ? from : nullptr); }

inline void commit_copies() { shim::Block::commit_copies(); }

template <int LEFT>
inline void wait_for_copies() {
  shim::Block::wait_for_copies(LEFT);
}

inline void sync_threads(int barrier, int threads) { shim::Block::barrier(barrier, threads); }

inline void finish_copies() { shim::Block::finish_copies(); }

}  // namespace resdense::cuda
