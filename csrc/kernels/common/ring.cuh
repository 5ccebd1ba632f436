// A ring of stages in shared memory that one thread, the producer, fills by bulk copies
// (cp.async.bulk, compute capability 9.0) and that consumers empty. Each stage has a barrier that
// opens when its bytes have come and one that opens when every consumer has read it.
//
// The barrier instructions carry a "memory" clobber: without it the compiler moves accesses of
// shared memory across them.
#pragma once

#include <cstdint>

#include "shared_memory.cuh"

namespace muddformer::kernels {

// A block has at most 8 consumer warps (kMaxNormConsumers has more) and the producer's. Three
// blocks of this size share a multiprocessor, so that some compute or store while others wait: a
// thread may have 72 registers. Of smaller blocks there are more.
inline constexpr int kMaxConsumers = 256;
inline constexpr int kRingThreads = kMaxConsumers + 32;
inline constexpr int kRingBlocks = 3;
inline constexpr int kMaxStages = 32;

struct RingBarriers {
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];
};

// A place in a ring. The phase of its barriers flips each time the place comes round.
struct RingPlace {
  int index = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance(int count) {
    if (++index == count) {
      index = 0;
      phase ^= 1;
    }
  }
};

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Arrives and announces bytes that are to come before the barrier opens.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Waits until the phase is over.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t phase) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}

// Called by the producer; the others see the barriers after a __syncthreads.
__device__ __forceinline__ void ring_init(RingBarriers& ring, int stages, int consumers) {
  for (int i = 0; i < stages; ++i) {
    barrier_init(&ring.full[i], 1);
    barrier_init(&ring.empty[i], consumers);
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// A barrier of the consumers, whose threads come first in the block.
__device__ __forceinline__ void sync_consumers(int consumers) {
  asm volatile("bar.sync 1, %0;" ::"r"(consumers) : "memory");
}

// Copies bytes (a multiple of 16, both ends aligned to 16) and counts them at the barrier.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, uint32_t bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Tells the producer that this thread has read the stage. The fence orders the reads before the
// next bulk copy, which is no ordinary store: without it results were wrong now and then, at few
// sources. Every thread arrives: that costs no more than one thread of each warp, and
// compute-sanitizer's racecheck can follow it.
__device__ __forceinline__ void release(uint64_t* empty) {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  barrier_arrive(empty);
}

#endif  // __CUDA_ARCH__ >= 900

}  // namespace muddformer::kernels
