// The barrier of a cluster of blocks, and access to the shared memory of its other blocks; kernels
// that follow each other closely. Of compute capability 9.0.
#pragma once

#include "ring.cuh"

namespace muddformer::kernels {

// The barrier of a cluster of CL blocks; with one block it is nothing.
template <int CL>
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  if constexpr (CL > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

// The same where nothing is handed over that the other blocks will read: it does not wait for this
// thread's stores.
template <int CL>
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  if constexpr (CL > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

template <int CL>
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  if constexpr (CL > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Also a barrier of the block where a cluster has but one.
template <int CL>
__device__ __forceinline__ void cluster_sync() {
  if constexpr (CL > 1) {
    cluster_arrive<CL>();
    cluster_wait<CL>();
  } else {
    __syncthreads();
  }
}

// Where an address in this block's shared memory is in that of the block of this rank.
__device__ __forceinline__ uint32_t address_of_rank(uint32_t address, int rank) {
  uint32_t there = 0;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
#endif
  return there;
}

// Loads from such an address.
__device__ __forceinline__ float load_of_cluster(uint32_t address) {
  float v = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
#endif
  return v;
}

__device__ __forceinline__ float4 load_four_of_cluster(uint32_t address) {
  float4 v{};
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
#endif
  return v;
}

// Stores to such an address.
__device__ __forceinline__ void store_four_to_cluster(uint32_t address, const float4& v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x),
               "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
#endif
}

// Lets the next kernel, where that may be launched while this one runs, come to the multiprocessors
// once all blocks have said so.
__device__ __forceinline__ void let_next_kernel_come() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// For kernels launched while the one before may still run (launch_wide): lets the next one come to
// the multiprocessors as soon as there is room, and waits until all that was launched before is
// done and its results are there.
__device__ __forceinline__ void wait_for_kernel_before() {
  let_next_kernel_come();
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace muddformer::kernels
