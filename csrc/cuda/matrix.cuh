#pragma once
// The matrix units, which all lanes of a warp call together, and the copies that feed them: the one place with PTX. (The shim
// has the same functions by the fragment layouts that the PTX manual documents.)

#include "device.cuh"

namespace resdense::cuda {

// Where a 16-byte piece lies in rows of 128 bytes: those of the eight rows that ldmatrix reads at once are in different banks. With
// r a multiple of 8 and k even, place(row + r, piece) = place(row, piece) + 8 r and place(row, k + (0 or 1)) =
// place(row, 0 or 1) ^ k.
__device__ inline int place_in_rows(int row, int piece) { return row * 8 + (piece ^ (row & 7)); }

}  // namespace resdense::cuda

#ifdef RESDENSE_SHIM
#include "shim_matrix.h"
#else

namespace resdense::cuda {

// The shared memory that a launch asks for, 16-byte aligned.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// Four matrices of 8 rows x 16 bytes in shared memory: lane l brings the address of row l % 8 of matrix l / 8, and gets of
// each matrix the 4 bytes l % 4 of row l / 4.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// The same of the matrices' transposes, for 16-bit values: a lane gets the values l / 4 of the rows 2 * (l % 4) and the next.
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// c += a * b for 16 x 16 of a (matrices: upper left, lower left, upper right, lower right) and 16 x 8 of b (upper, lower; each
// stored a column a row). Of c a lane has columns 2 * (l % 4) and the next, in rows l / 4 and l / 4 + 8.
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory, or zeros; they are there after a wait and a barrier.
__device__ inline void copy_16_bytes(void* to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(__cvta_generic_to_global(from)), "r"(exists ? 16 : 0)
               : "memory");
}

// Closes a group of this thread's copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all closed groups but the latest LEFT.
template <int LEFT>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// A barrier of some warps of a block, so many threads: those that call it by the same number, which is not 0.
__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Waits for all copies.
__device__ inline void finish_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace resdense::cuda

#endif
