// Depth aggregation on CUDA: launchers for forward and chained backward. Plain data in, no torch.
//
//   forward    Y_c[t, :]  = sum_j w[t, c, j] X_j[t, :]
//   backward   dX_j[t, :] = G_j[t, :] + sum_c w[t, c, j] dY_c[t, :]
//              dw[t, c, j] = <dY_c[t, :], X_j[t, :]>
//
// G_j is the gradient that later layers have accumulated for source j.
// tokens (N), dim (D), sources (S, index j), ways (C, index c). Sums are accumulated in float32
// (float64 for float64) and rounded once. Every launcher only enqueues kernels on the stream: no
// synchronisation, no allocation, no atomics, so the results repeat bit for bit and a CUDA graph
// can capture it. The arrays of pointers are host memory and are copied into the kernels'
// parameters before the launcher returns.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/dtype.h"

namespace muddformer::kernels {

// How the work is done. Automatic takes the last of these that the device, the alignment and the
// sizes allow.
enum class Path {
  Automatic,
  Scalar,  // any dtype, width, alignment; up to kMaxWays ways
  Vector,  // 16-byte loads; float32, bfloat16, float16
  Ring,    // bulk copies into a ring of stages in shared memory; compute capability 9.0 and later
};

constexpr int kMaxSources = 1024;  // of the forward; the backward takes any number
constexpr int kMaxWays = 64;

struct AggregateForward {
  DType dtype;
  int64_t tokens;
  int64_t dim;
  int sources;
  int ways;
  const void* const* x;     // [S] pointers to [N, D]; a row is contiguous
  const int64_t* x_stride;  // [S] elements from a row to the next
  const void* w;            // [N, C, S], a token's block contiguous
  int64_t w_stride;         // elements from a token's block to the next; 0: one block for all
  void* const* y;           // [C] pointers to [N, D], contiguous
  Path path = Path::Automatic;
};

// No output shares memory with an input or another output.
struct AggregateBackward {
  DType dtype;
  int64_t tokens;
  int64_t dim;
  int sources;
  int ways;
  const void* const* x;        // as above
  const int64_t* x_stride;     // as above
  const void* w;               // as above
  int64_t w_stride;            // as above
  const void* const* dy;       // [C] pointers to [N, D], contiguous; nullptr: a gradient of zeros
  const void* const* grad_in;  // [S] pointers to G_j [N, D], contiguous; nullptr: none
  void* const* grad_out;       // [S] pointers to dX_j [N, D], contiguous; nullptr: not wanted, for
                               // the first sources at less than half the price
  void* dw;                    // [N, C, S], contiguous
  Path path = Path::Automatic;
};

// cudaErrorInvalidValue for sizes out of range, cudaErrorNotSupported for a path that was named but
// cannot be taken.
cudaError_t launch_aggregate_forward(const AggregateForward& args, cudaStream_t stream);
cudaError_t launch_aggregate_backward(const AggregateBackward& args, cudaStream_t stream);

}  // namespace muddformer::kernels
