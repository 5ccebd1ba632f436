// Products of a warpgroup (128 threads) on the tensor cores of Hopper: wgmma, of compute capability
// 9.0a. Both operands lie in shared memory as boxes of 64 rows x 128 bytes in the swizzle of
// tensor_copy.cuh, 64 x 64 elements; the sums are in registers.
//
// The products run on while the warpgroup goes on: fence() before the first, commit() after the
// last, wait() before the sums are touched, then settle() for each array of sums.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

namespace muddformer::kernels {

inline constexpr int kBoxBytes = 64 * 128;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// An operand: how the tensor core walks over the box at an address of 1 KB alignment. Adding a step
// goes on by 16 of k, adding kOperandBox by a box.
//
// Rows of k (the other dimension contiguous): 16 of k are 16 rows. More of the other dimension is
// in the boxes that follow.
inline constexpr int kRowsStep = 16 * 128 >> 4, kColumnsStep = 32 >> 4;
inline constexpr int kOperandBox = kBoxBytes >> 4;

__device__ __forceinline__ uint64_t operand_rows_of_k(uint32_t address) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{kOperandBox} << 16 |
         (address >> 4 & 0x3fff);
}

// Columns of k (k contiguous): 16 of k are 32 bytes of each row. More of the other dimension is in
// the rows, and boxes, that follow.
__device__ __forceinline__ uint64_t operand_columns_of_k(uint32_t address) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 |
         (address >> 4 & 0x3fff);
}

__device__ __forceinline__ void warpgroup_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `pending` of the committed groups are under way.
template <int pending>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from reading the sums before the wait.
template <int count>
__device__ __forceinline__ void warpgroup_settle(float (&sums)[count]) {
#pragma unroll
  for (float& sum : sums) asm volatile("" : "+f"(sum)::"memory");
}

#define MUDDFORMER_SUMS_8(c, i)                                                               \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define MUDDFORMER_SUMS_32(c, i)                                                      \
  MUDDFORMER_SUMS_8(c, i), MUDDFORMER_SUMS_8(c, i + 8), MUDDFORMER_SUMS_8(c, i + 16), \
      MUDDFORMER_SUMS_8(c, i + 24)
#define MUDDFORMER_PLACES_32                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MUDDFORMER_PLACES_64                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MUDDFORMER_PLACES_96                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MUDDFORMER_WGMMA(columns, type, places, left, right, accumulate_at, left_rows_at,       \
                         right_rows_at, ...)                                                    \
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, " accumulate_at                          \
               ", 0;\n"                                                                         \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" places \
               "}, " left ", " right ", more, 1, 1, " left_rows_at ", " right_rows_at ";\n}"    \
               : __VA_ARGS__                                                                    \
               : "l"(a), "l"(b), "r"(accumulate), "n"(left_rows_of_k), "n"(right_rows_of_k))

// c = a b, added to c where accumulate is not 0: 64 rows x 2 `count` columns, 16 of k. A lane's c[4
// n + j] is of row 16 warp + lane / 4 + 8 (j / 2) and column 8 n + 2 (lane % 4) + j % 2. Operands
// come as rows of k (1) or as columns of k (0).
template <typename T, int left_rows_of_k, int right_rows_of_k, int count>
__device__ __forceinline__ void warpgroup_multiply(float (&c)[count], uint64_t a, uint64_t b,
                                                   int accumulate) {
  static_assert(count == 32 || count == 64 || count == 96);
  constexpr bool kBrain = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (count == 32 && kBrain) {
    MUDDFORMER_WGMMA("64", "bf16", MUDDFORMER_PLACES_32, "%32", "%33", "%34", "%35", "%36",
                     MUDDFORMER_SUMS_32(c, 0));
  } else if constexpr (count == 32 && !kBrain) {
    MUDDFORMER_WGMMA("64", "f16", MUDDFORMER_PLACES_32, "%32", "%33", "%34", "%35", "%36",
                     MUDDFORMER_SUMS_32(c, 0));
  } else if constexpr (count == 64 && kBrain) {
    MUDDFORMER_WGMMA("128", "bf16", MUDDFORMER_PLACES_64, "%64", "%65", "%66", "%67", "%68",
                     MUDDFORMER_SUMS_32(c, 0), MUDDFORMER_SUMS_32(c, 32));
  } else if constexpr (count == 64 && !kBrain) {
    MUDDFORMER_WGMMA("128", "f16", MUDDFORMER_PLACES_64, "%64", "%65", "%66", "%67", "%68",
                     MUDDFORMER_SUMS_32(c, 0), MUDDFORMER_SUMS_32(c, 32));
  } else if constexpr (count == 96 && kBrain) {
    MUDDFORMER_WGMMA("192", "bf16", MUDDFORMER_PLACES_96, "%96", "%97", "%98", "%99", "%100",
                     MUDDFORMER_SUMS_32(c, 0), MUDDFORMER_SUMS_32(c, 32),
                     MUDDFORMER_SUMS_32(c, 64));
  } else if constexpr (count == 96 && !kBrain) {
    MUDDFORMER_WGMMA("192", "f16", MUDDFORMER_PLACES_96, "%96", "%97", "%98", "%99", "%100",
                     MUDDFORMER_SUMS_32(c, 0), MUDDFORMER_SUMS_32(c, 32),
                     MUDDFORMER_SUMS_32(c, 64));
  }
}

#undef MUDDFORMER_WGMMA
#undef MUDDFORMER_PLACES_32
#undef MUDDFORMER_PLACES_64
#undef MUDDFORMER_PLACES_96
#undef MUDDFORMER_SUMS_32
#undef MUDDFORMER_SUMS_8

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace muddformer::kernels
