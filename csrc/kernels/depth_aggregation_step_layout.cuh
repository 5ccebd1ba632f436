// Parameters of the kernel of depth_aggregation_step.cuh, and its places in shared memory.
#pragma once

#include "depth_aggregation_step.h"
#include "vector.cuh"

namespace muddformer::kernels {

inline constexpr int kStepThreads = 512;  // at most
inline constexpr int kStepWarps = kStepThreads / 32;

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
  int tokens;
  int dim;
  int sources;
  int padded;  // sources, rounded up to a multiple of 4
  int ways;
  int chunks;  // of 4 ways
  int hidden;
  int rows;     // of W1 in a block, a multiple of 4
  int vectors;  // of 16 bytes of a source's row in a block
  int passes;   // of the threads over the words of 4 bytes of these vectors, 4 threads to a word
  bool wide;
  bool gelu_tanh;
  bool layer_norm;
  bool normed;  // any way is
  const void* norm_weight[kMaxStepWays];
  const void* norm_bias[kMaxStepWays];
  T* y[kMaxStepWays];
  const T* x[kMaxStepSources];
  int64_t x_stride[kMaxStepSources];
};

struct StepBarriers {
  uint64_t parts;  // of A
  uint64_t totals[2];
};

// Places in dynamic shared memory, in bytes. The tokens of a cluster are t, its blocks b.
struct StepShared {
  int sources;  // [t][padded][vectors] of 16 bytes
  int norms;    // [2][C] weights and biases of the block's columns
  int w2;       // [n][rows]
  int sums;     // [t][rows + 1][warps], the last row of x^2; later [t][chunk][4][warps]
  int gelu;     // [t][rows]
  int part;     // [t][n]
  int parts;    // [b][t][n]
  int a;        // [t][n]
  int y;        // [t][chunk][pass][threads] words
  int totals;   // [2][t][chunk][4][b]
  int bytes;
};

template <typename T>
__host__ __device__ StepShared step_shared(const StepArgs<T>& p, int tokens, int blocks,
                                           int threads) {
  const int entries = 4 * p.chunks * p.padded;
  const int streams = 4 * p.chunks * tokens;
  const int columns = p.vectors * kVector<T>;
  int end = 0;
  const auto place = [&](int bytes) {
    const int start = end;
    end += (bytes + 15) / 16 * 16;
    return start;
  };
  StepShared s;
  s.sources = place(tokens * p.padded * p.vectors * 16);
  s.norms = place(p.normed ? 2 * p.ways * columns * (p.wide ? 4 : int{sizeof(T)}) : 0);
  s.w2 = place(entries * p.rows * int{sizeof(T)});
  const int rows = p.rows + 1 > 4 * p.chunks ? p.rows + 1 : 4 * p.chunks;
  s.sums = place(tokens * rows * kStepWarps * 4);
  s.gelu = place(tokens * p.rows * 4);
  s.part = place(p.hidden == 0 ? 0 : tokens * entries * 4);
  s.parts = place(p.hidden == 0 ? 0 : blocks * tokens * entries * 4);
  s.a = place(tokens * entries * 4);
  s.y = place(p.normed ? tokens * p.chunks * p.passes * threads * kWord<T> * 4 : 0);
  s.totals = place(p.normed ? 2 * streams * blocks * 4 : 0);
  s.bytes = end;
  return s;
}

}  // namespace muddformer::kernels
