#include "backward.cuh"
#include "forward.cuh"

namespace muddformer::kernels {

template cudaError_t forward_norm<__nv_bfloat16>(const AggregateNormForward&, cudaStream_t);
template cudaError_t backward_norm<__nv_bfloat16>(const AggregateNormBackward&, int, cudaStream_t);

}  // namespace muddformer::kernels
