#include "forward.cuh"

namespace muddformer::kernels {

template cudaError_t forward_fast<__nv_bfloat16>(const AggregateForward&, Path, cudaStream_t);

}  // namespace muddformer::kernels
