#include "forward.cuh"

namespace muddformer::kernels {

template cudaError_t forward_fast<float>(const AggregateForward&, Path, cudaStream_t);

}  // namespace muddformer::kernels
