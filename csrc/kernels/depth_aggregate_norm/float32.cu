#include "backward.cuh"
#include "forward.cuh"

namespace muddformer::kernels {

template cudaError_t forward_norm<float>(const AggregateNormForward&, cudaStream_t);
template cudaError_t backward_norm<float>(const AggregateNormBackward&, int, cudaStream_t);

}  // namespace muddformer::kernels
