// Sums of what the blocks of a kernel leave behind, each in its own place: the second pass of
// gradients that all rows add to, such as those of a norm's weight. The order of the additions is
// fixed.
#pragma once

#include <cuda_runtime_api.h>

#include "dtype.h"

namespace muddformer::kernels {

inline constexpr int kMaxSums = 16;

struct PartialSums {
  const float* partial;  // [blocks, slots, dim]
  void* to[kMaxSums];    // [slots] pointers to [dim]; nullptr: not wanted
  int slots;
  int blocks;
  int dim;
  DType dtype;  // of what is written: Float32, BFloat16 or Float16
};

cudaError_t launch_partial_sums(const PartialSums& args, cudaStream_t stream);

}  // namespace muddformer::kernels
