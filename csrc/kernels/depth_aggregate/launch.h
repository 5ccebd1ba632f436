// The fast paths of one dtype, instantiated for float, __half and __nv_bfloat16 in files of their
// own.
#pragma once

#include <cuda_runtime_api.h>

#include "depth_aggregate.h"

namespace muddformer::kernels {

inline constexpr int kForwardTable = 128;  // most sources of the forward's fast paths

template <typename T>
cudaError_t forward_fast(const AggregateForward& p, Path path, cudaStream_t stream);

template <typename T>
cudaError_t backward_fast(const AggregateBackward& p, Path path, cudaStream_t stream);

}  // namespace muddformer::kernels
