#include "backward.cuh"

namespace muddformer::kernels {

template cudaError_t backward_fast<__nv_bfloat16>(const AggregateBackward&, Path, cudaStream_t);

}  // namespace muddformer::kernels
