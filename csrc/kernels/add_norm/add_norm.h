// Residual addition and the norm after it on CUDA: the launchers. Plain data in, no torch.
//
//   s = residual + x,  y = norm(s)
//   RMSNorm:   y = s r w,             r = 1 / sqrt(mean(s^2) + eps)
//   LayerNorm: y = (s - m) r w + b,   r = 1 / sqrt(mean((s - m)^2) + eps),  m = mean(s)
//
// and backwards, ds being the gradient that s gets elsewhere, n = (s - m) r and g = dy w:
//
//   dresidual = dx = ds + r (g - mean(g) - n mean(g n))      (RMSNorm: without mean(g))
//   dw = sum over the rows of dy n,  db = sum over the rows of dy
//
// The norm reads s as it is stored, rounded to its dtype. Sums are float32; dw and db are added up
// within each block, and then over the blocks in a fixed order. The launchers only enqueue kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/dtype.h"

namespace muddformer::kernels {

// Dtypes: all one of Float32, BFloat16 and Float16; or sum Float32 and the others one of 16 bits.
struct AddNormTypes {
  DType x;       // and dx
  DType sum;     // s, residual and their gradients
  DType normed;  // y and dy
  bool wide;     // w, b and their gradients are Float32, else of the dtype of the sum
};

struct AddNorm {
  AddNormTypes types;
  int64_t rows;
  int64_t dim;
  bool layer;  // LayerNorm
  float eps;
  const void* x;  // [rows, dim], entries of a row contiguous, as those of all others
  int64_t x_stride;
  const void* residual;
  int64_t residual_stride;
  const void* weight;  // [dim]
  const void* bias;    // [dim], of a LayerNorm
  void* sum;           // [rows, dim], contiguous
  void* normed;        // [rows, dim], contiguous
  float* rstd;         // [rows]: r
  float* mean;         // [rows], of a LayerNorm
};

struct AddNormBackward {
  AddNormTypes types;
  int64_t rows;
  int64_t dim;
  bool layer;
  const void* grad_sum;  // ds: [rows, dim]; nullptr: none
  int64_t grad_sum_stride;
  const void* grad_normed;  // dy
  int64_t grad_normed_stride;
  const void* sum;  // [rows, dim], contiguous, as those below
  const void* weight;
  const float* rstd;
  const float* mean;
  void* grad_residual;
  void* grad_x;       // where x has another dtype than the sum; else nullptr
  void* grad_weight;  // [dim]; nullptr: not wanted
  void* grad_bias;    // [dim], of a LayerNorm; nullptr: not wanted
  float* workspace;   // add_norm_workspace() floats
};

// Floats that the backward wants for the sums of its blocks.
cudaError_t add_norm_workspace(const AddNormBackward& args, int64_t& floats);

// cudaErrorNotSupported, before anything is launched, for other dtypes and for rows that are too
// wide: 16384 entries (8192 of a float32 sum), or 4096 where a row is no whole vectors of 16 bytes.
cudaError_t launch_add_norm(const AddNorm& args, cudaStream_t stream);
cudaError_t launch_add_norm_backward(const AddNormBackward& args, cudaStream_t stream);

}  // namespace muddformer::kernels
