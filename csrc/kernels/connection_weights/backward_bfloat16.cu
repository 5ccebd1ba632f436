#include "hidden_backward.cuh"
#include "input_backward.cuh"

namespace muddformer::kernels {
template cudaError_t weights_hidden_backward<__nv_bfloat16>(const ConnectionWeightsHiddenBackward&,
                                                            const Device&, cudaStream_t);
template cudaError_t weights_input_backward<__nv_bfloat16>(const ConnectionWeightsInputBackward&,
                                                           const Device&, cudaStream_t);
}  // namespace muddformer::kernels
