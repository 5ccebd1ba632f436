// See partial_sums.h. A block has 32 columns of one slot; a warp of it adds every sixteenth partial
// sum.
#include "partial_sums.h"
#include "vector.cuh"

namespace muddformer::kernels {
namespace {

constexpr int kWarps = 16;

__global__ void __launch_bounds__(32 * kWarps) sum_partials(const __grid_constant__ PartialSums p) {
  __shared__ float sums[kWarps][32];
  const int column = blockIdx.x * 32 + threadIdx.x;
  const int slot = blockIdx.y;
  const int64_t stride = static_cast<int64_t>(p.slots) * p.dim;
  const float* from = p.partial + static_cast<int64_t>(slot) * p.dim + column;
  float sum = 0.0f;
  if (column < p.dim) {
#pragma unroll 8
    for (int i = threadIdx.y; i < p.blocks; i += kWarps) sum += from[i * stride];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= p.dim || p.to[slot] == nullptr) return;
  for (int i = 1; i < kWarps; ++i) sum += sums[i][threadIdx.x];
  if (p.dtype == DType::Float32) {
    static_cast<float*>(p.to[slot])[column] = sum;
  } else if (p.dtype == DType::BFloat16) {
    static_cast<__nv_bfloat16*>(p.to[slot])[column] = narrow<__nv_bfloat16>(sum);
  } else {
    static_cast<__half*>(p.to[slot])[column] = narrow<__half>(sum);
  }
}

}  // namespace

cudaError_t launch_partial_sums(const PartialSums& args, cudaStream_t stream) {
  if (args.slots == 0 || args.dim == 0) return cudaSuccess;
  const dim3 grid((args.dim + 31) / 32, args.slots);
  sum_partials<<<grid, dim3(32, kWarps), 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace muddformer::kernels
