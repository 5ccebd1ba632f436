// Deferred gradients of the hidden states on CUDA: the launcher. Plain data in, no torch.
//
//   dX_j[t, :] = G_j[t, :] + sum_i sum_c w_i[t, c, j] dV_{i,c}[t, :]
//
// for the hidden states j that several layers i of aggregation have in common: instead of adding
// its term to every dX_j at once, each layer leaves its factors, the gradients dV of its sums and
// its weights, and all terms are added in one pass. tokens (N), dim (D), sources (S, index j),
// ways (C_i, index c). Sums are float32, rounded once for every 16 factors; the launcher
// only enqueues kernels.
#pragma once

#include "../common/dtype.h"

namespace muddformer::kernels {

struct DeferredFlush {
  DType dtype;  // BFloat16 or Float16
  int64_t tokens;
  int64_t dim;  // a multiple of 8
  int sources;
  int factors;                 // of all layers together
  const void* const* dv;       // [factors] pointers to dV [N, D], contiguous
  const void* const* w;        // [factors] pointers to the weights of the factor's way: [S] of a
                               // token are contiguous
  const int64_t* w_stride;     // [factors] elements from a token to the next
  const void* const* grad_in;  // [S] pointers to G_j [N, D], contiguous; nullptr: none
  void* const* grad_out;       // [S] pointers to dX_j [N, D], contiguous
};

// cudaErrorNotSupported, before anything is launched, for other dtypes, widths and alignments.
cudaError_t launch_deferred_flush(const DeferredFlush& args, cudaStream_t stream);

}  // namespace muddformer::kernels
