// See partial_sums.h. A block has 32 columns of one sum; a warp of it adds every sixteenth partial
// sum.
#include "cluster.cuh"
#include "launch.h"
#include "partial_sums.h"
#include "vector.cuh"

namespace muddformer::kernels {
namespace {

constexpr int kWarps = 16;

__global__ void __launch_bounds__(32 * kWarps) sum_partials(const __grid_constant__ PartialSums p) {
  __shared__ float sums[kWarps][32];
  const int column = blockIdx.x * 32 + threadIdx.x;
  const PartialSum& of = p.sums[blockIdx.y];
  wait_for_kernel_before();
  if (of.to == nullptr) return;
  float sum = 0.0f;
  if (column < p.dim) {
#pragma unroll 8
    for (int i = threadIdx.y; i < of.blocks; i += kWarps) sum += of.partial[i * of.stride + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= p.dim) return;
  for (int i = 1; i < kWarps; ++i) sum += sums[i][threadIdx.x];
  if (p.dtype == DType::Float32) {
    static_cast<float*>(of.to)[column] = sum;
  } else if (p.dtype == DType::BFloat16) {
    static_cast<__nv_bfloat16*>(of.to)[column] = narrow<__nv_bfloat16>(sum);
  } else {
    static_cast<__half*>(of.to)[column] = narrow<__half>(sum);
  }
}

}  // namespace

cudaError_t launch_partial_sums(const PartialSums& args, const Device& device,
                                cudaStream_t stream) {
  if (args.sums[0].to == nullptr && args.sums[1].to == nullptr) return cudaSuccess;
  Launch launch((args.dim + 31) / 32, 1, 32 * kWarps, 0, stream, device.bulk_copy);
  launch.config.gridDim.y = 2;
  launch.config.blockDim = dim3(32, kWarps);
  return cudaLaunchKernelEx(&launch.config, sum_partials, args);
}

}  // namespace muddformer::kernels
