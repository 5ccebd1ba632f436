// Depth aggregation whose streams are normed while they are made, on CUDA: launchers for forward
// and chained backward. Plain data in, no torch. See depth_aggregate.h for the aggregation itself.
//
//   mix_c = sum_j w[t, c, j] X_j[t, :]
//   Y_c   = norm_c(base + mix_c)                   a way with a norm weight
//         = base + mix_c                           a way without
//         = base + RMSNorm(mix_c) * post_weight    the last way, if there is a post weight
//
// base is the last source, X_i, where it is to be added (PostDANorm), otherwise 0. With a pre
// weight (PreDANorm) the last source is mixed as normed = RMSNorm(X_i) * pre_weight. norm_c is
// RMSNorm, v * r * weight with r = 1 / sqrt(mean(v^2) + eps), or LayerNorm, (v - m) * r * weight +
// bias.
//
// The backward takes the normed streams back instead of what was normed: n = (Y - bias) / weight.
// Where a weight is too small for that, n is made again from the sources.
#pragma once

#include "../depth_aggregate/depth_aggregate.h"

namespace muddformer::kernels {

enum class Norm { RMS, Layer };

constexpr int kMaxNormSources = 64;
constexpr int kMaxNormWays = 4;

struct AggregateNormForward : AggregateForward {
  Norm norm;
  float eps;
  bool wide;                       // all norm weights and biases are float32; otherwise of dtype
  bool add_newest;                 // base is the last source
  const void* const* norm_weight;  // [C] pointers to [D]; nullptr: the way has no norm
  const void* const* norm_bias;    // [C] pointers to [D]; nullptr: none
  const void* pre_weight;          // [D]; nullptr: none
  const void* post_weight;         // [D]; nullptr: none
  void* normed;                    // [N, D], contiguous, with pre_weight
  void* mix;                       // [N, D], contiguous: mix_c of the last way, with post_weight
  float* statistics;               // [2, C, N]: m and r of every way; 0 and 1 without a norm. With
                                   // pre_weight [2, C + 1, N], the last those of the last source
};

struct AggregateNormBackward : AggregateBackward {
  Norm norm;
  bool wide;
  bool add_newest;                 // as above
  const void* const* norm_weight;  // as above
  const void* const* norm_bias;    // as above
  const void* pre_weight;          // as above
  const void* post_weight;         // as above
  const void* const* y;            // [C] pointers to [N, D], contiguous: of normed ways
  const void* mix;                 // as above
  const float* statistics;         // as above
  void* const* dv;                 // [C] pointers to the gradients dV_c of base + mix_c (of mix_c
                                   // with the post weight) [N, D], contiguous, of ways with a
                                   // norm; nullptr each or all: not wanted
  void* const* norm_weight_grad;   // [C] pointers to [D], of the weights' type
  void* const* norm_bias_grad;     // [C] pointers to [D]
  void* pre_weight_grad;           // [D]
  void* post_weight_grad;          // [D]
  float* workspace;                // aggregate_norm_workspace() floats
};

// Whether the forward takes these sizes on the current device, all pointers being aligned: the code
// that runs there decides, which on a device of capability 9.0 may be translated from compute_80.
bool aggregate_norm_supported(DType dtype, int64_t dim, int sources, int ways);

// cudaErrorNotSupported, before anything is launched, for what only the composition of aggregation
// and norm can do: float64, widths and alignments without 16-byte vectors, more ways or sources
// than the limits above, rows of more than 4096 vectors of 16 bytes or too wide for the shared
// memory, devices before compute capability 9.0. cudaErrorInvalidValue for a post
// weight without add_newest or mix or beside another norm of the last way, a pre weight without
// normed, a bias without a weight, and a backward of no tokens.
cudaError_t launch_aggregate_norm_forward(const AggregateNormForward& args, cudaStream_t stream);
cudaError_t launch_aggregate_norm_backward(const AggregateNormBackward& args, cudaStream_t stream);

// Floats that the backward needs for partial sums of the gradients of norm weights and biases.
cudaError_t aggregate_norm_workspace(const AggregateNormBackward& args, int64_t* floats);

}  // namespace muddformer::kernels
