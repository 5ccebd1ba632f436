// What blocks of a cluster send each other by st.async, which counts at a barrier of the receiver;
// of compute capability 9.0.
#pragma once

#include "cluster.cuh"

namespace muddformer::kernels {

#if __CUDA_ARCH__ >= 900

// The barrier of a cluster is alike for all numbers of blocks above one, such as this.
inline constexpr int kMaxCluster = 16;

// A barrier for one use, at which so many bytes arrive.
__device__ __forceinline__ void open_barrier(uint64_t* barrier, int bytes) {
  barrier_init(barrier, 1);
  barrier_expect(barrier, bytes);
}

// Called by all threads of a block when its barriers for what others send are made and the thread
// that made them has published them by a fence: a release here would wait a microsecond for
// nothing.
__device__ __forceinline__ void announce_barriers() {
  cluster_arrive_relaxed<kMaxCluster>();
}

// From here on all blocks of the cluster have started and their barriers are ready.
__device__ __forceinline__ void wait_for_barriers() {
  cluster_wait<kMaxCluster>();
}

// The place in another block's shared memory where this block has `own`.
__device__ __forceinline__ uint32_t in_block(const void* own, int rank) {
  return address_of_rank(shared_address(own), rank);
}

__device__ __forceinline__ void send(uint32_t to, uint32_t barrier, float value) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to),
      "f"(value), "r"(barrier)
      : "memory");
}

// Waits for what other blocks send, at a barrier that is used once.
__device__ __forceinline__ void wait_for_sent(uint64_t* barrier) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%0], 0;\n"
      "@!over bra again;\n"
      "}" ::"r"(shared_address(barrier))
      : "memory");
}

#endif  // __CUDA_ARCH__ >= 900

}  // namespace muddformer::kernels
