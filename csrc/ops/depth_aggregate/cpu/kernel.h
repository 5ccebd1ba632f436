// Kernels of the aggregation on the CPU, compiled once for each instruction set and chosen at run
// time. Plain data only: kernel.cpp is compiled with the flags of its instruction set and must
// share no inline function with the rest of the library that could carry those instructions there.
#pragma once

#include <cstdint>

#include "../../common/cpu_dtype.h"

namespace muddformer::cpu {

// Rows t = begin..end-1 of  Y_c[t, :] = sum_j W[t, c, j] X_j[t, :].
struct AggregateForward {
  int64_t sources, ways, width;                     // S, C, D
  const void* const* x;                             // S sources, [tokens, D], rows contiguous
  const int64_t* x_stride;                          // elements from one row of a source to the next
  const void* weights;                              // [tokens, C, S]
  int64_t token_stride, way_stride, source_stride;  // of the weights, in elements
  void* const* y;                                   // C outputs, [tokens, D], contiguous
};

// Rows of  dX_j[t, :] = G_j[t, :] + sum_c W[t, c, j] dY_c[t, :]
//     and  dW[t, c, j] = <dY_c[t, :], X_j[t, :]>.
struct AggregateBackward {
  int64_t sources, ways, width;
  const void* const* x;
  const int64_t* x_stride;
  const void* weights;
  int64_t token_stride, way_stride, source_stride;
  const void* const* grad_outputs;  // C gradients dY_c; nullptr stands for zero
  const int64_t* grad_output_stride;
  const void* const* grad_hiddens;  // S incoming gradients G_j; nullptr stands for zero
  const int64_t* grad_hidden_stride;
  void* const* grad_x;  // S gradients dX_j, [tokens, D], contiguous
  void* grad_weights;   // [tokens, C, S], contiguous
  bool past_caches;     // write dX past the caches: its rows must be aligned to kRowAlignment bytes
};

// scratch: scratch_bytes() of one thread, aligned to 64 bytes.
using ForwardKernel = void (*)(const AggregateForward&, int64_t begin, int64_t end, void* scratch);
using BackwardKernel = void (*)(const AggregateBackward&, int64_t begin, int64_t end,
                                void* scratch);

struct AggregateKernels {
  // Indexed by KernelDtype.
  ForwardKernel forward[4];
  BackwardKernel backward[4];
};

constexpr int64_t kRowAlignment = 64;

// Rows of scratch are padded to a multiple of this many elements, at least one vector.
constexpr int64_t kRowPadding = 32;

// Backward: a row of zeros, C rows of converted gradients where they are not in the accumulation
// type and two of partial sums, then pointers to C rows and the weights of a token. Forward:
// pointers to the S rows of a token, then its weights.
inline int64_t scratch_bytes(int64_t sources, int64_t ways, int64_t width) {
  return static_cast<int64_t>(sizeof(double)) *
         ((ways + 2) * (width + kRowPadding) + (ways + 1) * (sources + 1));
}

extern const AggregateKernels aggregate_kernels_default;
#if defined(MUDDFORMER_X86_KERNELS)
extern const AggregateKernels aggregate_kernels_avx2;
extern const AggregateKernels aggregate_kernels_avx512;
// In place of aggregate_kernels_avx512's kernels for bfloat16 on CPUs that also have AVX512-BF16.
extern const ForwardKernel forward_bfloat16_avx512;
extern const BackwardKernel backward_bfloat16_avx512;
#endif

}  // namespace muddformer::cpu
