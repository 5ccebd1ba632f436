// A whole layer of depth aggregation for a few tokens, as decoding has them, in one launch on CUDA.
// Plain data in, no torch.
//
//   r = rsqrt(mean(x^2) + eps)                    x = X_{S-1}, the newest source
//   A = GELU((x r scale) W1^T) W2^T + prior       or prior alone;  optionally cap * tanh(A / cap)
//   Y_c = norm_c(sum_j A[c, j] X_j)               norm_c: RMSNorm, LayerNorm or none
//
// Everything between the inputs and the outputs is float32, but for A where the streams are of 2
// bytes: there it is the sum of two numbers of their type, good to 2^-17 of its size (bfloat16) or
// to 2^-23 (float16: below 65504; next to 0 to 2^-36). The launcher only enqueues a kernel: no
// synchronisation, no allocation, no atomics, so the results repeat bit for bit and a CUDA graph
// can capture it. The arrays of pointers are host memory and are copied into the kernel's
// parameters before the launcher returns.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/dtype.h"

namespace muddformer::kernels {

constexpr int kMaxStepTokens = 64;  // above, products by cuBLAS are the better choice
constexpr int kMaxStepSources = 128;
constexpr int kMaxStepWays = 8;

struct AggregationStep {
  DType dtype;  // float32, bfloat16 or float16
  int64_t tokens;
  int64_t dim;
  int sources;
  int ways;
  int hidden;               // K of the generator, or 0: the prior alone
  const void* const* x;     // [S] pointers to [N, D]; a row is contiguous
  const int64_t* x_stride;  // [S] elements from a row to the next
  const void* w1;           // [K, D]
  const void* w2;           // [C * S, K]
  bool wide;          // prior, scale and the norms' parameters are float32; otherwise of dtype
  const void* prior;  // [C, S]
  const void* scale;  // [D]; nullptr: none
  float eps;
  bool gelu_tanh;
  float cap;        // 0: none
  bool layer_norm;  // otherwise RMSNorm
  float norm_eps;
  const void* const* norm_weight;  // [C] pointers to [D]; nullptr: the way is not normed
  const void* const* norm_bias;    // [C] pointers to [D]; nullptr: none
  void* const* y;                  // [C] pointers to [N, D], contiguous
};

// The most tokens that the kernel takes on the current device; 0 where there is none for this dtype
// or device.
int aggregation_step_tokens(DType dtype);

// cudaErrorInvalidValue for sizes out of range. cudaErrorNotSupported, before anything is launched,
// for what only the composition of several kernels can do: float64, rows that are no aligned
// vectors of 16 bytes, K not a multiple of 4, sizes above the limits or beyond the shared memory,
// devices before compute capability 9.0.
cudaError_t launch_aggregation_step(const AggregationStep& args, cudaStream_t stream);

}  // namespace muddformer::kernels
