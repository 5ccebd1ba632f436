// SwiGLU's product on CUDA: the launchers. Plain data in, no torch.
//
//   y = silu(g) u,  silu(g) = g / (1 + exp(-g))
//   du = dy silu(g),  dg = dy u s (1 + g (1 - s)),  s = 1 / (1 + exp(-g))
//
// One pass each way: the backward makes silu(g) again, so that g and u are all that is kept.
// Computed in float32; the launchers only enqueue a kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/dtype.h"

namespace muddformer::kernels {

struct Swiglu {
  DType dtype;  // Float32, BFloat16 or Float16
  int64_t rows;
  int64_t width;        // F
  const void* gate;     // g and u: [rows, F], entries of a row contiguous
  int64_t gate_stride;  // elements from a row to the next
  const void* up;
  int64_t up_stride;
  void* out;  // y: [rows, F], contiguous; not used by the backward
};

struct SwigluBackward {
  Swiglu forward;
  const void* grad;  // dy: [rows, F]
  int64_t grad_stride;
  void* grad_gate;  // dg and du: [rows, F]
  void* grad_up;
  int64_t grads_stride;  // of both
};

// cudaErrorNotSupported, before anything is launched, for other dtypes and 2^32 entries or more.
cudaError_t launch_swiglu(const Swiglu& args, cudaStream_t stream);
cudaError_t launch_swiglu_backward(const SwigluBackward& args, cudaStream_t stream);

}  // namespace muddformer::kernels
