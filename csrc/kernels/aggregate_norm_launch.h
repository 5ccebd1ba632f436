// The kernels of one dtype, instantiated for float, __half and __nv_bfloat16 in files of their own.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

#include "aggregate_norm.h"
#include "plan.h"

namespace muddformer::kernels {

// A block has at most 16 consumer warps, so that a row of 4096 columns of 2 bytes is one chunk.
// Where shared memory is short it has fewer: smaller chunks leave more of it to what is kept of a
// row.
inline constexpr int kMaxNormConsumers = 512;

// Threads that a multiprocessor is to hold, which is what limits their registers (72 and 96). Where
// as many blocks fit with fewer threads, the kernel that has more registers (80 and 128) is faster.
// Each of the four schedulers has a quarter of the registers: five warps of 96, never 21 in all.
struct NormThreads {
  static constexpr int kForward = 864;
  static constexpr int kForwardRoomy = 768;
  static constexpr int kBackward = 640;
  static constexpr int kBackwardRoomy = 512;
};

static_assert(NormThreads::kForward == kRingBlocks * kRingThreads, "as ring_stages() assumes");

inline constexpr int kSharedMemory = 227 * 1024;  // of all blocks, 1 KB of it for each
inline constexpr int kStaticBytes = 2560;         // at most, of a block
inline constexpr int kLeastNormStages = 3;

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
  int blocks = 0;  // 0: it does not fit
  bool roomy;      // the kernel with more registers

  explicit NormLayout(const AggregateNormBackward& p) {
    for (int most = kMaxNormConsumers; blocks == 0 && most >= 64; most /= 2) lay_out(p, most);
  }

 private:
  void lay_out(const AggregateNormBackward& p, int most) {
    const int vector = p.dtype == DType::Float32 ? 4 : 8;
    columns = split_columns(static_cast<int>(p.dim) / vector, most);
    stage_bytes = 2 * columns.threads * 16;
    const int padded = p.ways == 3 ? 4 : p.ways;  // kWaysPadded
    const int64_t norms = 4 * NormSlots(p).count * p.dim;
    const int64_t least =
        p.ways * stage_bytes + norms +
        4 * (2 * p.sources * padded + 2 * columns.threads / 32 * p.ways * p.sources) +
        (p.dim / vector + 3) / 4 * 4 +
        (p.pre_weight != nullptr && columns.chunks > 1 ? 4 * p.dim : 0);
    const int threads = columns.threads + 64;
    blocks = NormThreads::kBackward / threads;
    const auto stages_beside = [&](int64_t other) {
      const int64_t room = kSharedMemory / blocks - 1024 - kStaticBytes - other;
      const int even = (kBackwardBytesInFlight / blocks + stage_bytes - 1) / stage_bytes;
      const int wanted = std::min(std::max(even, kLeastNormStages), kMaxStages);
      return static_cast<int>(std::min<int64_t>(wanted, room / stage_bytes));
    };
    while (blocks > 0 && stages_beside(least) < kLeastNormStages) --blocks;
    if (blocks == 0) return;
    shared_norms = stages_beside(least + norms) >= kLeastNormStages;
    other_bytes = static_cast<int>(least + (shared_norms ? norms : 0));
    stages = stages_beside(other_bytes);
    roomy = blocks * threads <= NormThreads::kBackwardRoomy;
  }
};

// Of the forward: float4s of the sums that wait in shared memory.
__host__ __device__ constexpr int64_t held_float4s(int ways, int vector, const Columns& columns) {
  return columns.chunks == 1 ? 0 : int64_t{ways} * (vector / 4) * columns.chunks * columns.threads;
}

// How a forward is laid out: the ring, and the sums that wait where a row has more than one chunk.
struct NormForwardLayout {
  Columns columns;
  int stage_bytes;
  int stages;
  int64_t held_bytes;
  int64_t shared_bytes;  // in all, which may be more than there is
  bool roomy;            // the kernel with more registers

  explicit NormForwardLayout(const AggregateNormForward& p) {
    const int vector = p.dtype == DType::Float32 ? 4 : 8;
    for (int most = kMaxNormConsumers; most >= 64; most /= 2) {
      columns = split_columns(static_cast<int>(p.dim) / vector, most);
      stage_bytes = columns.threads * 16;
      stages = ring_stages(columns.threads, stage_bytes, kForwardBytesInFlight);
      held_bytes = 16 * held_float4s(p.ways, vector, columns);
      shared_bytes = int64_t{stages} * stage_bytes + held_bytes + p.sources * 16;
      if (shared_bytes <= kSharedMemory - kStaticBytes) break;
    }
    const int threads = columns.threads + 32;
    roomy = NormThreads::kForwardRoomy / threads == NormThreads::kForward / threads;
  }
};

template <typename T>
cudaError_t forward_norm(const AggregateNormForward& p, cudaStream_t stream);

// Each block leaves a partial sum for every gradient of a norm.
template <typename T>
cudaError_t backward_norm(const AggregateNormBackward& p, int blocks, cudaStream_t stream);

}  // namespace muddformer::kernels
