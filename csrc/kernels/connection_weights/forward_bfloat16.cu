#include "forward.cuh"

namespace muddformer::kernels {
template cudaError_t weights_forward<__nv_bfloat16>(const ConnectionWeightsForward&, const Device&,
                                                    cudaStream_t);
}
