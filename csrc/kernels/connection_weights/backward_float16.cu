#include "hidden_backward.cuh"
#include "input_backward.cuh"

namespace muddformer::kernels {
template cudaError_t weights_hidden_backward<__half>(const ConnectionWeightsHiddenBackward&,
                                                     const Device&, cudaStream_t);
template cudaError_t weights_input_backward<__half>(const ConnectionWeightsInputBackward&,
                                                    const Device&, cudaStream_t);
}  // namespace muddformer::kernels
