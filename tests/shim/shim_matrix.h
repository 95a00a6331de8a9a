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
    float a[4][2], b[2][2];
  } mine;
  const auto unpack = [](float (&to)[2], uint32_t from) {
    T values[2];
    std::memcpy(values, &from, sizeof values);
    for (unsigned i = 0; i < 2; ++i) to[i] = values[i];
  };
  for (unsigned i = 0; i < 4; ++i) unpack(mine.a[i], a[i]);
  unpack(mine.b[0], b0);
  unpack(mine.b[1], b1);
  const auto fragments = shim::Block::exchange(mine);
  const unsigned lane = threadIdx.x % 32, row = lane / 4, first = 2 * (lane % 4);
  for (unsigned owner = 0; owner < 4; ++owner) {  // of the values 2 owner and 2 owner + 1 of either half of the inner dimension
    const Fragments left = fragments(4 * row + owner);
    for (unsigned column = 0; column < 2; ++column) {
      const Fragments right = fragments(4 * (first + column) + owner);
      for (unsigned lower = 0; lower < 2; ++lower)
        for (unsigned half = 0; half < 2; ++half)
          for (unsigned k = 0; k < 2; ++k) c[2 * lower + column] += left.a[2 * half + lower][k] * right.b[half][k];
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
