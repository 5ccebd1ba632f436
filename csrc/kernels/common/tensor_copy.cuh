// Copies of boxes between matrices in global memory and shared memory (cp.async.bulk.tensor,
// compute capability 9.0). A box is 64 rows x 64 elements of 16 bits, in shared memory 64 rows of
// 128 bytes in the swizzle of tensor_core.cuh; it must start at a multiple of 1 KB. What lies
// beyond the matrix is read as zero, and not written.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "dtype.h"
#include "ring.cuh"

namespace muddformer::kernels {

// Describes a contiguous matrix [rows, columns], aligned to 16 bytes, of a multiple of 8 columns.
inline cudaError_t describe_matrix(CUtensorMap& map, DType dtype, const void* matrix, int64_t rows,
                                   int64_t columns) {
  static void* const entry = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? found : nullptr;
  }();
  if (entry == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes = 2 * static_cast<cuuint64_t>(columns);
  const cuuint32_t box[2] = {64, 64}, steps[2] = {1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      &map,
      dtype == DType::BFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      2, const_cast<void*>(matrix), sizes, &row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#if __CUDA_ARCH__ >= 900

// A box at this column and row into shared memory, its 8 KB counted at the barrier.
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap& map, int64_t column,
                                         int64_t row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(static_cast<int>(column)), "r"(static_cast<int>(row)),
      "r"(shared_address(barrier))
      : "memory");
}

// The way back. The threads that wrote the box have each made a fence of the asynchronous proxy.
__device__ __forceinline__ void store_box(const CUtensorMap& map, int64_t column, int64_t row,
                                          uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
      "r"(static_cast<int>(column)), "r"(static_cast<int>(row)), "r"(from)
      : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until the boxes that this thread stores have been read.
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

__device__ __forceinline__ void proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif  // __CUDA_ARCH__ >= 900

}  // namespace muddformer::kernels
