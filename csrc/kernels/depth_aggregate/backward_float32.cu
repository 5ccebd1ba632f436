#include "backward.cuh"

namespace muddformer::kernels {

template cudaError_t backward_fast<float>(const AggregateBackward&, Path, cudaStream_t);

}  // namespace muddformer::kernels
