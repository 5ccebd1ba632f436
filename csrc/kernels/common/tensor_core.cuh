// Matrix products of 16-bit tiles in shared memory: m16n8k16 on the tensor cores (compute
// capability 8.0 and later), and the swizzle that keeps their loads and 16-byte copies free of bank
// conflicts.
//
// A tile has rows of a multiple of 128 bytes. The 16-byte chunk of a row lies at the place chunk
// xor (row % 8): eight rows at one chunk, which a matrix load fetches together, are in different
// banks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "shared_memory.cuh"

namespace muddformer::kernels {

__device__ __forceinline__ uint32_t swizzled(int row, int chunk, int row_bytes) {
  return static_cast<uint32_t>(row * row_bytes + ((chunk ^ (row & 7)) << 4));
}

__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address));
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address));
}

// Operands of the products, as this lane's part of a tile that starts at `tile`. The left operand
// is [m][k], 16 x 16; the right one 16 of k by two blocks of 8 of n, (m[0], m[1]) and (m[2], m[3]).
__device__ __forceinline__ void load_left(uint32_t (&a)[4], uint32_t tile, int m, int chunk_k,
                                          int row_bytes) {
  const int lane = threadIdx.x % 32;
  load_matrices(a, tile + swizzled(m + (lane & 15), chunk_k + (lane >> 4), row_bytes));
}

// The left operand out of a tile [k][m].
__device__ __forceinline__ void load_left_transposed(uint32_t (&a)[4], uint32_t tile, int chunk_m,
                                                     int k, int row_bytes) {
  const int lane = threadIdx.x % 32;
  load_matrices_transposed(a, tile + swizzled(k + (lane & 7) + ((lane >> 4) << 3),
                                              chunk_m + ((lane >> 3) & 1), row_bytes));
}

// The right operand out of a tile [n][k], with the 16 rows taken in such an order that a lane's
// columns of the two blocks of the product are four neighbours: row 4 (i / 2) + i % 2 is column
// i of the first block, the row 2 below of the second. The tile is laid out by swizzled_pairs().
__device__ __forceinline__ uint32_t swizzled_pairs(int row, int chunk, int row_bytes) {
  const int key = (row >> 2 & 3) << 1 | (row & 1);  // different for the rows of one block
  return static_cast<uint32_t>(row * row_bytes + ((chunk ^ key) << 4));
}

__device__ __forceinline__ void load_right_pairs(uint32_t (&b)[4], uint32_t tile, int n,
                                                 int chunk_k, int row_bytes) {
  const int lane = threadIdx.x % 32;
  const int row = n + ((lane & 6) << 1) + (lane & 1) + ((lane >> 4) << 1);
  load_matrices(b, tile + swizzled_pairs(row, chunk_k + ((lane >> 3) & 1), row_bytes));
}

// The right operand out of a tile [k][n].
__device__ __forceinline__ void load_right_transposed(uint32_t (&b)[4], uint32_t tile, int chunk_n,
                                                      int k, int row_bytes) {
  const int lane = threadIdx.x % 32;
  load_matrices_transposed(b, tile + swizzled(k + (lane & 15), chunk_n + (lane >> 4), row_bytes));
}

// c += a b. A lane holds c of rows lane / 4 (c[0], c[1]) and lane / 4 + 8 (c[2], c[3]) and columns
// 2 (lane % 4) and the next.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace muddformer::kernels
