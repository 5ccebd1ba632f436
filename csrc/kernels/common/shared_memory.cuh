// Addresses in shared memory, and asynchronous copies into it by cp.async (compute capability 8.0
// and later).
#pragma once

#include <cstdint>

namespace muddformer::kernels {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// So many bytes from global to shared memory.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes)
                 : "memory");
  }
}

// 16 bytes, or zeros; the address must be valid in both cases.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `pending` of the groups committed by this thread are under way.
template <int pending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Waits for all copies of this thread.
__device__ __forceinline__ void copy_wait_all() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

__device__ __forceinline__ void copy_wait(int pending) {
  if (pending == 2) {
    copy_wait<2>();
  } else if (pending == 1) {
    copy_wait<1>();
  } else {
    copy_wait<0>();
  }
}

// For a ring of stages of which all but one are under way.
__device__ __forceinline__ void copy_wait_stage(int stages) {
  copy_wait(stages - 2);
}

}  // namespace muddformer::kernels
