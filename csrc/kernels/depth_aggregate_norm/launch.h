// The kernels of one dtype, instantiated for float, __half and __nv_bfloat16 in files of their own.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

#include "../common/launch.h"
#include "depth_aggregate_norm.h"

namespace muddformer::kernels {

// A block has at most 16 consumer warps, so that in the backward a row of 4096 columns of 2 bytes
// is one chunk. Where shared memory is short it has fewer there: smaller chunks leave more of it to
// what is kept of a row.
inline constexpr int kMaxNormConsumers = 512;

// In the forward the chunks of a row are the blocks of a cluster. Every device allows so many.
inline constexpr int kMaxNormBlocks = 8;

// Threads that a multiprocessor is to hold, which is what limits their registers (56 and 96). Where
// as many blocks of the backward fit with fewer threads, the kernel that has more registers (128)
// is faster. Each of the four schedulers has a quarter of the registers: five warps of 96, never 21
// in all.
struct NormThreads {
  static constexpr int kForward = 1152;
  static constexpr int kBackward = 640;
  static constexpr int kBackwardRoomy = 512;
};

// More than kForwardBytesInFlight: a block that norms or starts has nothing under way for a while.
inline constexpr int kNormForwardBytesInFlight = 96 * 1024;

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

// How a forward is laid out: in more blocks a row where they keep a good part more vectors on a
// multiprocessor. The number is a power of two; clusters of three were slower.
struct NormForwardLayout {
  Columns columns{0, 0};  // no threads: the row is too wide
  int stage_bytes = 0;
  int stages = 0;
  int shared_bytes = 0;  // of a block, beside the kernel's own variables

  NormForwardLayout(DType dtype, int64_t dim, int sources) {
    const int vectors = static_cast<int>(dim) / (dtype == DType::Float32 ? 4 : 8);
    int most = 0;
    for (int blocks = 1; blocks <= kMaxNormBlocks; blocks *= 2) {
      const int width = (vectors + blocks - 1) / blocks;
      const int threads = (width + 31) / 32 * 32;
      const int resident = NormThreads::kForward / (threads + 32) * width;
      const bool possible = threads <= kMaxNormConsumers && (blocks - 1) * threads < vectors;
      if (!possible || 8 * resident <= 9 * most) continue;
      columns = {blocks, threads};
      most = resident;
    }
    if (columns.threads == 0) return;
    stage_bytes = columns.threads * 16;
    const int beside = NormThreads::kForward / (columns.threads + 32);  // blocks
    stages = ring_stages(beside, stage_bytes, kNormForwardBytesInFlight);
    shared_bytes = stages * stage_bytes + sources * kMaxNormWays * int{sizeof(float)};
  }
};

template <typename T>
cudaError_t forward_norm(const AggregateNormForward& p, cudaStream_t stream);

// Each block leaves a partial sum for every gradient of a norm.
template <typename T>
cudaError_t backward_norm(const AggregateNormBackward& p, int blocks, cudaStream_t stream);

}  // namespace muddformer::kernels
