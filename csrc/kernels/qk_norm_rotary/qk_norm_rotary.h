// Norms of the heads of queries and keys and their rotation by the position on CUDA: the launchers.
// Plain data in, no torch.
//
// Of every head x [E] of a token, with n = x / sqrt(mean(x^2) + eps) * w (without a weight n = x),
// entry i < half pairs with entry i + half:
//
//   y_i        = n_i cos_i - n_{i + half} sin_i
//   y_{i+half} = n_i sin_i + n_{i + half} cos_i
//
// and the other E - 2 half entries pass through. Backwards the gradient dy is rotated back to dn,
// and with u = x r, r = 1 / sqrt(...), g = dn w:
//
//   dx = r (g - u mean(g u)),  dw = sum over tokens and heads of dn u
//
// Queries and keys are one launch. Computed in float32, rounded once. r is made again from x, so
// that nothing is kept but x. dw is added up within each block, and then over the blocks in a fixed
// order. The launchers only enqueue kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/dtype.h"

namespace muddformer::kernels {

// Heads [batch, tokens, heads, E] of queries or keys: entries of a head are contiguous, and in
// elements it is so far from a batch, a token, a head to the next.
struct Heads {
  void* data;
  int64_t batch_stride;
  int64_t token_stride;
  int64_t head_stride;
};

inline constexpr int kQueries = 0, kKeys = 1;

struct QkNormRotary {
  DType dtype;  // of the heads: Float32, BFloat16 or Float16
  bool wide;    // weights and their gradients are Float32, else of the dtype
  int64_t batch;
  int64_t tokens;
  int heads[2];  // of queries, of keys
  int head_dim;  // E
  int half;
  float eps;
  const float* cos;  // [tokens, half] of a batch: entries contiguous
  const float* sin;
  int64_t rotary_batch_stride;  // of both; 0: the same for every batch
  int64_t rotary_token_stride;
  const void* weight[2];  // [E]; both or, where there are no norms, none
  Heads x[2];
  Heads y[2];  // not used by the backward
};

struct QkNormRotaryBackward {
  QkNormRotary forward;  // x is not read where there are no norms
  Heads dy[2];
  Heads dx[2];
  void* grad_weight[2];  // [E]; nullptr: not wanted
  float* workspace;      // qk_norm_rotary_workspace() floats
};

// Floats that the backward wants for the sums of its blocks.
cudaError_t qk_norm_rotary_workspace(const QkNormRotaryBackward& args, int64_t& floats);

// cudaErrorNotSupported, before anything is launched, for other dtypes, heads of more than 512
// entries (256 of float32, and where they, the tables or the weights are no whole vectors), an odd
// E, 2^31 tokens or more, and about 2^32 pairs of heads or more.
cudaError_t launch_qk_norm_rotary(const QkNormRotary& args, cudaStream_t stream);
cudaError_t launch_qk_norm_rotary_backward(const QkNormRotaryBackward& args, cudaStream_t stream);

}  // namespace muddformer::kernels
