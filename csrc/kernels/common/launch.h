// Host side of the launches: what pointers must be like, how a row is split over threads, and how
// many stages a ring gets.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cstdint>

#include "device.h"
#include "ring.cuh"

namespace muddformer::kernels {

// Whether vectors of 16 bytes can be loaded from there.
inline bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <typename Pointer>
bool aligned(const Pointer* pointers, int count) {
  return std::all_of(pointers, pointers + count,
                     [](const void* pointer) { return aligned(pointer); });
}

inline constexpr int64_t kMaxDim = INT_MAX / 2;

// A row is split into chunks of columns: one vector of 16 bytes for each consumer of a block, of
// which there are at most `most`.
struct Columns {
  int chunks;
  int threads;  // a multiple of 32; a chunk has threads vectors, the last one may have fewer
};

constexpr Columns split_columns(int vectors, int most = kMaxConsumers) {
  const int chunks = (vectors + most - 1) / most;
  const int width = (vectors + chunks - 1) / chunks;
  return {chunks, (width + 31) / 32 * 32};
}

inline constexpr int kForwardBytesInFlight = 64 * 1024;  // of a multiprocessor
inline constexpr int kBackwardBytesInFlight = 48 * 1024;

// Blocks of a multiprocessor, of a kernel that is bound to kRingBlocks blocks of kRingThreads.
constexpr int ring_blocks(int consumers) {
  return kRingBlocks * kRingThreads / (consumers + 32);
}

// Stages of a block, such that the blocks of a multiprocessor have about bytes_in_flight under way
// together. More is slower: it only makes the memory switch more often between more places.
constexpr int ring_stages(int blocks, int stage_bytes, int bytes_in_flight) {
  const int stages = (bytes_in_flight / blocks + stage_bytes - 1) / stage_bytes;
  return std::min(std::max(stages, 2), kMaxStages);
}

// A launch of so many blocks, in clusters where those have more than one. overlaps: it may start
// before the kernel ahead of it is over.
struct Launch {
  Launch(int64_t blocks, int cluster, int threads, int shared_bytes, cudaStream_t stream,
         bool overlaps) {
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = attributes;
    if (overlaps) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    }
  }
  Launch(const Launch&) = delete;  // config points to the attributes
  Launch& operator=(const Launch&) = delete;

  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
};

// Launches a ring kernel, which has the member stages among its parameters, in clusters of so many
// blocks. More than 48 KB of shared memory need permission; a kernel's own variables, below 4 KB,
// count as well.
template <typename Args>
cudaError_t launch_ring(void (*kernel)(Args), const Args& args, int64_t blocks, int consumers,
                        int stage_bytes, int other_bytes, cudaStream_t stream, int cluster = 1) {
  const int shared_bytes = args.stages * stage_bytes + other_bytes;
  if (shared_bytes > 44 * 1024) {
    const cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  const Launch launch(blocks, cluster, consumers + 32, shared_bytes, stream, false);
  return cudaLaunchKernelEx(&launch.config, kernel, args);
}

}  // namespace muddformer::kernels
