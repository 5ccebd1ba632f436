// Parameters of the kernel of layer.cuh, and its places in shared memory.
#pragma once

#include <algorithm>

#include "../common/vector.cuh"
#include "depth_aggregation_step.h"

namespace muddformer::kernels {

inline constexpr int kStepThreads = 512;  // at most
inline constexpr int kStepWarps = kStepThreads / 32;

struct StepBarriers {
  uint64_t sources;    // the copies of the sources
  uint64_t parts;      // of the entries of A that this block adds up
  uint64_t a;          // all of A
  uint64_t totals[2];  // of the norms
};

// Places in dynamic shared memory, in bytes. The tokens of a cluster are t, its blocks b.
struct StepShared {
  int sources;    // [t][padded][stride] of 16 bytes
  int norms;      // [2][C] weights and biases of the block's columns
  int x;          // [warp][t][32] vectors, until h is summed up
  int w2;         // [n][rows]
  int sums;       // [t][rows + 1][kStepWarps], the last row of x^2
  int gelu;       // [warp][t][rows], of the warps that have entries of A
  int parts;      // [b][owned]
  int a;          // [t][n]
  int y;          // [t][chunk][pass][threads] words, at the place of x
  int warp_sums;  // [2][t][chunk][4][kStepWarps]
  int totals;     // [2][t][chunk][4][16]
  int bytes;
};

template <typename T>
struct StepArgs {
  const T* w1;
  const T* w2;
  const void* prior;
  const void* scale;
  float eps;
  float norm_eps;
  float cap;
  float inverse_dim;
  StepShared places;
  int threads;
  int blocks_log2;  // of a cluster
  int tokens;
  int dim;
  int sources;
  int padded;  // sources, rounded up to a multiple of 16
  int ways;
  int chunks;  // of 4 ways
  int hidden;
  int rows;     // of W1 in a block, a multiple of 4
  int vectors;  // of 16 bytes of a source's row in a block
  int stride;   // from one of them to the next in shared memory, odd: no bank is asked twice
  int passes;   // of the threads over the words of 4 bytes of these vectors, 4 threads to a word
  int warp_sources;  // that a warp copies, a lane for each
  int owned_log2;    // of the number of entries of A that a block adds up; at least 4
  bool wide;
  bool gelu_tanh;
  bool layer_norm;
  uint32_t normed_ways;  // bit c: way c has a norm's weight
  uint32_t biased_ways;
  const void* norm_weight[kMaxStepWays];
  const void* norm_bias[kMaxStepWays];
  T* y[kMaxStepWays];
  struct {
    const T* x;
    int64_t stride;
  } source[kMaxStepSources];
};

template <typename T>
StepShared step_shared(const StepArgs<T>& p, int tokens) {
  const int blocks = 1 << p.blocks_log2;
  const int entries = 4 * p.chunks * p.padded;
  const int streams = 4 * p.chunks * tokens;
  const int columns = p.vectors * kVector<T>;
  const int warps = p.threads / 32;
  const bool normed = p.normed_ways != 0;
  const bool with_tensor_cores = sizeof(T) == 2 && p.hidden > 0 && p.scale == nullptr;
  int end = 0;
  const auto place = [&](int bytes) {
    const int start = end;
    end += (bytes + 15) / 16 * 16;
    return start;
  };
  StepShared s;
  s.sources = place(tokens * p.padded * p.stride * 16);
  s.norms = place(normed ? 2 * p.ways * columns * (p.wide ? 4 : int{sizeof(T)}) : 0);
  const int x_bytes = with_tensor_cores ? warps * tokens * 32 * 16 : 0;
  const int y_bytes = normed ? tokens * p.chunks * p.passes * p.threads * kWord<T> * 4 : 0;
  s.x = s.y = place(std::max(x_bytes, y_bytes));
  s.w2 = place(entries * p.rows * int{sizeof(T)});
  s.sums = place(tokens * (p.rows + 1) * kStepWarps * 4);
  s.gelu = place(std::min(warps, (entries + 31) / 32) * tokens * p.rows * 4);
  s.parts = place(p.hidden == 0 ? 0 : blocks * 4 << p.owned_log2);
  s.a = place(tokens * entries * 4);
  s.warp_sums = place(normed ? 2 * streams * kStepWarps * 4 : 0);
  s.totals = place(normed ? 2 * streams * 16 * 4 : 0);
  s.bytes = end;
  return s;
}

}  // namespace muddformer::kernels
