// Sums of what the blocks of a kernel leave behind, each in its own place: the second pass of
// gradients that all rows add to, such as those of a norm's weight. The order of the additions is
// fixed.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "device.h"
#include "dtype.h"

namespace muddformer::kernels {

struct PartialSum {
  const float* partial;  // [blocks, dim]
  int64_t stride;        // floats from one block's sums to the next
  int blocks;
  void* to;  // [dim]; nullptr: not wanted
};

struct PartialSums {
  PartialSum sums[2];
  int dim;
  DType dtype;  // of what is written: Float32, BFloat16 or Float16
};

// Right after the kernel that leaves them, which may call let_next_kernel_come() before it does.
cudaError_t launch_partial_sums(const PartialSums& args, const Device& device, cudaStream_t stream);

}  // namespace muddformer::kernels
