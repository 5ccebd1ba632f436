// The kernels of one dtype, instantiated for float, __half and __nv_bfloat16 in files of their own.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

#include "aggregate_norm.h"
#include "plan.h"

namespace muddformer::kernels {

// The backward needs more registers than the plain one, so that two blocks share a multiprocessor;
// their rings fill up while they are busy with the norms of their next token.
inline constexpr int kNormThreads = kRingThreads + 32;
inline constexpr int kNormBlocks = 2;
inline constexpr int kSharedMemory = 227 * 1024;  // of a multiprocessor, 1 KB of it for each block
inline constexpr int kStaticBytes = 2048;         // at most, of a block
inline constexpr int kNormBytesInFlight = 64 * 1024;

// Whether the last source comes first, because more is done with it than with the others.
template <typename Args>
bool newest_first(const Args& p) {
  return p.add_newest || p.pre_weight != nullptr;
}

// Places of a way's gradients among the partial sums, and how many there are.
struct NormSlots {
  int weight[kMaxNormWays];
  int bias[kMaxNormWays];
  int pre;
  int count = 0;

  explicit NormSlots(const AggregateNormBackward& p) {
    for (int c = 0; c < p.ways; ++c) {
      const bool post = p.post_weight != nullptr && c == p.ways - 1;
      weight[c] = p.norm_weight[c] != nullptr || post ? count++ : -1;
      bias[c] = p.norm_bias[c] != nullptr ? count++ : -1;
    }
    pre = p.pre_weight != nullptr ? count++ : -1;
  }
};

// How a backward is laid out: the ring, the shared memory besides, and blocks of a multiprocessor.
struct NormLayout {
  Columns columns;
  int stage_bytes;
  int stages;
  bool shared_norms;
  int other_bytes;
  int blocks;  // 0: it does not fit

  explicit NormLayout(const AggregateNormBackward& p) {
    const int vector = p.dtype == DType::Float32 ? 4 : 8;
    columns = split_columns(static_cast<int>(p.dim) / vector);
    stage_bytes = 2 * columns.threads * 16;
    stages = ring_stages(columns.threads, stage_bytes, kNormBytesInFlight, kNormBlocks);
    const int by_threads = kNormBlocks * kNormThreads / (columns.threads + 64);
    const int padded = p.ways == 3 ? 4 : p.ways;  // kWaysPadded
    const int64_t small =
        4 * (2 * p.sources * padded + 2 * columns.threads / 32 * p.ways * p.sources) +
        (p.dim / vector + 3) / 4 * 4 +
        (p.pre_weight != nullptr && columns.chunks > 1 ? 4 * p.dim : 0);
    const int64_t norms = 4 * NormSlots(p).count * p.dim;
    const auto blocks_with = [&](int64_t other) {
      const int64_t all = stages * stage_bytes + other + kStaticBytes + 1024;
      return static_cast<int>(std::min<int64_t>(by_threads, kSharedMemory / all));
    };
    blocks = blocks_with(small + norms);
    shared_norms = blocks > 0 && blocks_with(small + 2 * norms) == blocks;
    other_bytes = blocks > 0 ? static_cast<int>(small + (shared_norms ? 2 : 1) * norms) : 0;
  }
};

// Shared memory of a block of the forward.
inline int64_t forward_norm_shared_bytes(const AggregateNormForward& p) {
  const int vector = p.dtype == DType::Float32 ? 4 : 8;
  const Columns columns = split_columns(static_cast<int>(p.dim) / vector);
  const int stage_bytes = columns.threads * 16;
  const int64_t held =
      columns.chunks == 1 ? 0 : int64_t{4} * p.ways * columns.chunks * columns.threads * vector;
  return ring_stages(columns.threads, stage_bytes, kForwardBytesInFlight) * stage_bytes + held +
         p.sources * 16;
}

template <typename T>
cudaError_t forward_norm(const AggregateNormForward& p, cudaStream_t stream);

// Each block leaves a partial sum for every gradient of a norm.
template <typename T>
cudaError_t backward_norm(const AggregateNormBackward& p, int blocks, cudaStream_t stream);

}  // namespace muddformer::kernels
