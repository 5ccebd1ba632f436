// From logits to losses and gradients on CUDA: the launcher. Plain data in, no torch.
//
//   lse = log sum_v exp(x_v),  loss = lse - (1 - s) x_y - s / V sum_v x_v + z lse^2
//   dx_v = g (exp(x_v - lse) (1 + 2 z lse) - s / V - (1 - s) [v = y])
//
// for the logits x of each token with target y: V classes, label smoothing s, weight z of the
// z-loss, g the gradient of the token's loss. The gradients take the place of the logits. Sums are
// float32; the launcher only enqueues a kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/dtype.h"

namespace muddformer::kernels {

struct TokenLosses {
  DType dtype;  // of the logits: Float32, BFloat16 or Float16
  int64_t tokens;
  int64_t classes;         // V
  int64_t stride;          // elements from a token's logits to the next one's: whole 16 bytes; what
                           // is between is overwritten
  void* logits;            // [tokens, V], replaced by their gradients
  const int64_t* targets;  // [tokens], from 0 to V - 1 or ignore_index: else an assertion fails
  const float* grad_losses;  // [tokens]; nullptr: 1 for every token
  float* losses;             // [tokens]; 0 for ignore_index, whose gradients are 0 too
  int64_t ignore_index;
  float label_smoothing;
  float z_loss;
  bool gradients;  // false: the logits stay as they are
};

// cudaErrorNotSupported, before anything is launched, for other dtypes, strides and alignments.
cudaError_t launch_token_losses(const TokenLosses& args, cudaStream_t stream);

}  // namespace muddformer::kernels
