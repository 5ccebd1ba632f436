// Connection weights on CUDA for 16-bit dtypes: launchers of the forward and of the steps of the
// backward. Plain data in, no torch.
//
//   forward   r = rsqrt(mean(x^2) + eps),  h = r x W1^T,  A = GELU(h) W2^T + prior,
//             optionally A <- cap * tanh(A / cap)
//   backward  dA = grad_weights, times 1 - (weights / cap)^2 under a cap
//             e  = r (dA W2) GELU'(h)                               GELU gradient times r
//             dx = grad_x + e W1 - x (r / D) sum_k e_k h_k
//             dW1 = e^T x,  dW2 = dA^T GELU(h),  dprior = sum over tokens of dA
//
// A norm's scale is folded into W1 by the caller: W1 stands for W1 * scale everywhere above, and
// then dscale = sum_k W1 (e^T x), dW1 = scale (e^T x) with the W1 that carries no scale.
//
// tokens (N), dim (D), hidden (K), outputs (C*S). Products are accumulated in float32; h, GELU(h),
// dA and e are rounded to the dtype. All matrices are contiguous and aligned to 16 bytes. Launchers
// only enqueue kernels: no synchronisation, no allocation, no atomics, fixed order of all sums.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/dtype.h"

namespace muddformer::kernels {

constexpr int kMaxHidden = 320;
constexpr int kMaxOutputs = 256;

// What forward and backward know alike.
struct ConnectionWeightsShape {
  DType dtype;  // BFloat16 or Float16
  int64_t tokens;
  int64_t dim;  // a multiple of 8
  int hidden;   // a multiple of 8, at most kMaxHidden
  int outputs;  // at most kMaxOutputs
  bool gelu_tanh;
  float cap;  // 0: none
};

struct ConnectionWeightsForward {
  ConnectionWeightsShape shape;
  float eps;
  const void* x;       // [N, D]
  const void* w1;      // [K, D]
  const void* w2;      // [C*S, K]
  const void* prior;   // [C*S]
  bool prior_float32;  // else of the dtype
  void* weights;       // [N, C*S], need not be aligned
  void* hidden;        // h [N, K], or nullptr
  float* factor;       // r [N], or nullptr
  int cluster = 0;     // blocks that share a tile of tokens: 1, 2, 4; 0: as suits the device
  bool plain = false;  // the kernel for every GPU, also where there is one for this GPU
};

// The rows of K: from grad_weights to e, and what dW2 and dprior are the sums of. The results come
// in parts: the coefficient for each slab of 64 columns of K, dW2 and dprior for each group of
// tokens.
struct ConnectionWeightsHiddenBackward {
  ConnectionWeightsShape shape;
  const void* grad_weights;  // [N, C*S], need not be aligned
  const void* weights;       // [N, C*S], need not be aligned; nullptr without a cap
  const void* w2;            // [C*S, K]
  const void* hidden;        // h [N, K]
  const float* factor;       // r [N]
  void* grad_hidden;         // e [N, K]
  float* coefficient;        // (r / D) sum_k e_k h_k [hidden_slabs(K), N]
  float* w2_partials;        // [groups, C*S, K], or nullptr: not wanted
  float* prior_partials;     // [groups, C*S]
};
int hidden_slabs(int hidden);
cudaError_t hidden_backward_groups(int64_t tokens, int64_t& groups);  // on the current device

// The rows of D: dx, and e^T x as a sum over `splits` partial matrices.
struct ConnectionWeightsInputBackward {
  ConnectionWeightsShape shape;
  const void* x;             // [N, D]
  const void* grad_x;        // [N, D], or nullptr for zero
  const void* w1;            // [K, D]
  const void* grad_hidden;   // e [N, K]
  const float* coefficient;  // [hidden_slabs(K), N]
  void* dx;                  // [N, D], or nullptr: not wanted
  float* w1_partials;        // [splits, K, D], or nullptr: not wanted
  int splits;                // of input_backward_splits()
  bool plain = false;        // the kernel for every GPU, also where there is one for this GPU
};
cudaError_t input_backward_splits(const ConnectionWeightsShape& shape, int& splits);

// Adds the partial matrices, and makes of them dW1, dscale, dW2 and dprior.
struct ConnectionWeightsReduce {
  ConnectionWeightsShape shape;
  const float* w1_partials;  // [splits, K, D], or nullptr: neither dW1 nor dscale
  int splits;
  void* dw1;                    // [K, D]
  const void* w1;               // [K, D] without the scale; used with scale_partials
  const void* scale;            // [D], or nullptr
  bool scale_float32;           // else of the dtype
  float* scale_partials;        // [reduce_rows(K), D], or nullptr: their sum over rows is dscale
  const float* w2_partials;     // [groups, C*S, K], or nullptr: no dW2
  const float* prior_partials;  // [groups, C*S]
  int64_t groups;
  void* dw2;           // [C*S, K]
  void* dprior;        // [C*S], or nullptr: not wanted
  bool prior_float32;  // else of the dtype
};
int reduce_rows(int hidden);

// out[j] = sum_i partials[i, j], in the order of i.
struct SumRows {
  DType dtype;  // of out: Float32, BFloat16 or Float16
  int64_t rows;
  int64_t columns;
  const float* partials;
  void* out;
};

// Whether the current device can run forward and backward of this shape.
bool connection_weights_supported(const ConnectionWeightsShape& shape);

cudaError_t launch_connection_weights_forward(const ConnectionWeightsForward& args,
                                              cudaStream_t stream);
cudaError_t launch_connection_weights_hidden_backward(const ConnectionWeightsHiddenBackward& args,
                                                      cudaStream_t stream);
cudaError_t launch_connection_weights_input_backward(const ConnectionWeightsInputBackward& args,
                                                     cudaStream_t stream);
cudaError_t launch_connection_weights_reduce(const ConnectionWeightsReduce& args,
                                             cudaStream_t stream);
cudaError_t launch_sum_rows(const SumRows& args, cudaStream_t stream);

}  // namespace muddformer::kernels
