#include "forward.cuh"

namespace muddformer::kernels {

template cudaError_t forward_fast<__half>(const AggregateForward&, Path, cudaStream_t);

}  // namespace muddformer::kernels
