#include "forward.cuh"

namespace muddformer::kernels {
template cudaError_t weights_forward<__half>(const ConnectionWeightsForward&, const Device&,
                                             cudaStream_t);
}
