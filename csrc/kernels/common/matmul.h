// One matrix product by cuBLASLt with what belongs to it in its epilogue: plain data in, no torch.
//
//   d [rows, columns] = epilogue(a [rows, depth] b [depth, columns]) + c
//
// All matrices are row-major; a transposed operand is stored the other way round. Descriptors and
// the algorithm that cuBLASLt's heuristic names are made once for a shape and kept, the algorithms
// are never timed. A launch only enqueues: a CUDA graph can capture it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace muddformer::kernels {

struct Matmul {
  DType dtype;      // of a, b, bias, gelu_input: BFloat16 or Float16
  DType out_dtype;  // of c, d and bias_grad: that dtype, or Float32
  int64_t rows, columns, depth;
  const void* a;
  int64_t a_stride;   // elements from a stored row to the next
  bool a_transposed;  // stored as [depth, rows]
  const void* b;
  int64_t b_stride;
  bool b_transposed;        // stored as [columns, depth]
  const void* c = nullptr;  // added, [rows, columns] with d's stride; it may be d itself
  void* d;
  int64_t d_stride;

  // The epilogue: one of these, or bias and GELU together.
  const void* bias = nullptr;  // [columns], added to each row
  bool gelu = false;           // tanh form
  void* gelu_input = nullptr;  // what the GELU is taken of, [rows, columns], kept for the backward
  bool gelu_grad = false;      // the product is multiplied by the GELU's derivative at gelu_input
  int64_t gelu_input_stride = 0;  // a multiple of 8
  void* bias_grad = nullptr;      // [rows], the sums of a over depth

  void* workspace;  // aligned to 256 bytes
  int64_t workspace_bytes;
};

// cudaErrorNotSupported, before anything is launched, where cuBLASLt has no algorithm.
cudaError_t launch_matmul(const Matmul& args, cudaStream_t stream);

}  // namespace muddformer::kernels
