// Checks and dispatch of depth aggregation with normed streams, and the sum of the blocks' shares
// of the gradients of the norms' weights.
#include <climits>

#include "../common/device.h"
#include "../common/vector.cuh"
#include "../depth_aggregate/checks.h"
#include "depth_aggregate_norm.h"
#include "launch.h"

namespace muddformer::kernels {
namespace {

constexpr int kMaxSlots = 2 * kMaxNormWays + 1;

template <typename Args>
bool norms_valid(const Args& p) {
  const bool post = p.post_weight != nullptr;
  for (int c = 0; c < p.ways; ++c) {
    if (p.norm_bias[c] != nullptr && p.norm_weight[c] == nullptr) return false;
    if (post && c == p.ways - 1 && p.norm_weight[c] != nullptr) return false;
  }
  return !post || (p.add_newest && p.mix != nullptr);
}

template <typename Args>
bool norms_aligned(const Args& p) {
  return aligned(p.norm_weight, p.ways) && aligned(p.norm_bias, p.ways) && aligned(p.pre_weight) &&
         aligned(p.post_weight) && aligned(p.mix);
}

template <typename Args>
cudaError_t check(const Args& p, Device& device) {
  if (!valid(p) || p.ways > kMaxNormWays || p.sources > kMaxNormSources) {
    return cudaErrorNotSupported;
  }
  if (!norms_valid(p)) return cudaErrorInvalidValue;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  return device.bulk_copy && has_vectors(p) && norms_aligned(p) ? cudaSuccess
                                                                : cudaErrorNotSupported;
}

cudaError_t check_backward(const AggregateNormBackward& p, int64_t& slots, int& blocks) {
  Device device;
  const cudaError_t error = check(p, device);
  if (error != cudaSuccess) return error;
  const NormLayout layout(p);
  if (layout.blocks == 0) return cudaErrorNotSupported;
  slots = NormSlots(p).count;
  const int64_t resident = static_cast<int64_t>(layout.blocks) * device.multiprocessors;
  blocks = static_cast<int>(std::min(resident, p.tokens));
  const int64_t bytes = int64_t{layout.stages} * layout.stage_bytes + layout.other_bytes;
  return bytes + kStaticBytes <= device.shared_bytes ? cudaSuccess : cudaErrorNotSupported;
}

struct SumArgs {
  const float* partial;  // [blocks, slots, dim]
  void* to[kMaxSlots];   // [dim]
  int blocks;
  int dim;
  DType dtype;  // of what is written
};

// A block of 32 x 8 threads has 32 columns of one slot; a thread adds every eighth partial sum.
__global__ void sum_partials(const __grid_constant__ SumArgs args) {
  __shared__ float sums[8][32];
  const int column = blockIdx.x * 32 + threadIdx.x;
  const int slot = blockIdx.y;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * args.dim;
  const float* from = args.partial + static_cast<int64_t>(slot) * args.dim + column;
  float sum = 0.0f;
  for (int i = threadIdx.y; column < args.dim && i < args.blocks; i += 8) sum += from[i * stride];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= args.dim || args.to[slot] == nullptr) return;
  for (int i = 1; i < 8; ++i) sum += sums[i][threadIdx.x];
  if (args.dtype == DType::Float32) {
    static_cast<float*>(args.to[slot])[column] = sum;
  } else if (args.dtype == DType::BFloat16) {
    static_cast<__nv_bfloat16*>(args.to[slot])[column] = narrow<__nv_bfloat16>(sum);
  } else {
    static_cast<__half*>(args.to[slot])[column] = narrow<__half>(sum);
  }
}

cudaError_t add_partials(const AggregateNormBackward& p, int blocks, cudaStream_t stream) {
  const NormSlots slots(p);
  if (slots.count == 0) return cudaSuccess;
  SumArgs args{};
  for (int c = 0; c < p.ways; ++c) {
    const bool post = p.post_weight != nullptr && c == p.ways - 1;
    if (slots.weight[c] >= 0) {
      args.to[slots.weight[c]] = post ? p.post_weight_grad : p.norm_weight_grad[c];
    }
    if (slots.bias[c] >= 0) args.to[slots.bias[c]] = p.norm_bias_grad[c];
  }
  if (slots.pre >= 0) args.to[slots.pre] = p.pre_weight_grad;
  args.partial = p.workspace;
  args.blocks = blocks;
  args.dim = static_cast<int>(p.dim);
  args.dtype = p.wide ? DType::Float32 : p.dtype;
  const dim3 grid((args.dim + 31) / 32, slots.count);
  sum_partials<<<grid, dim3(32, 8), 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

bool aggregate_norm_supported(DType dtype, int64_t dim, int sources, int ways) {
  Device device;
  if (dtype == DType::Float64 || dim < 1 || dim > kMaxDim ||
      dim % (dtype == DType::Float32 ? 4 : 8) || sources < 1 || sources > kMaxNormSources ||
      ways < 1 || ways > kMaxNormWays || current_device(device) != cudaSuccess ||
      !device.bulk_copy) {
    return false;
  }
  const NormForwardLayout layout(dtype, dim, sources);
  return layout.columns.threads != 0 && layout.shared_bytes + kStaticBytes <= device.shared_bytes;
}

cudaError_t launch_aggregate_norm_forward(const AggregateNormForward& p, cudaStream_t stream) {
  Device device;
  const cudaError_t error = check(p, device);
  if (error != cudaSuccess) return error;
  if (p.pre_weight != nullptr && p.normed == nullptr) return cudaErrorInvalidValue;
  if (!aligned(p.y, p.ways) || !aligned(p.normed)) return cudaErrorNotSupported;
  const NormForwardLayout layout(p.dtype, p.dim, p.sources);
  if (layout.columns.threads == 0 || p.tokens > INT_MAX / layout.columns.chunks) {
    return cudaErrorNotSupported;
  }
  if (layout.shared_bytes + kStaticBytes > device.shared_bytes) return cudaErrorNotSupported;
  if (p.tokens == 0) return cudaSuccess;
  switch (p.dtype) {
    case DType::Float32:
      return forward_norm<float>(p, stream);
    case DType::BFloat16:
      return forward_norm<__nv_bfloat16>(p, stream);
    default:
      return forward_norm<__half>(p, stream);
  }
}

cudaError_t aggregate_norm_workspace(const AggregateNormBackward& p, int64_t* floats) {
  int64_t slots = 0;
  int blocks = 0;
  const cudaError_t error = check_backward(p, slots, blocks);
  *floats = slots * blocks * p.dim;
  return error;
}

cudaError_t launch_aggregate_norm_backward(const AggregateNormBackward& p, cudaStream_t stream) {
  int64_t slots = 0;
  int blocks = 0;
  cudaError_t error = check_backward(p, slots, blocks);
  if (error != cudaSuccess) return error;
  if (!aligned(p.dy, p.ways) || !aligned(p.y, p.ways) || !aligned(p.grad_in, p.sources) ||
      !aligned(p.grad_out, p.sources) || (p.dv != nullptr && !aligned(p.dv, p.ways))) {
    return cudaErrorNotSupported;
  }
  if (p.tokens == 0) return cudaErrorInvalidValue;  // the caller's zeros are the gradients
  switch (p.dtype) {
    case DType::Float32:
      error = backward_norm<float>(p, blocks, stream);
      break;
    case DType::BFloat16:
      error = backward_norm<__nv_bfloat16>(p, blocks, stream);
      break;
    default:
      error = backward_norm<__half>(p, blocks, stream);
  }
  return error != cudaSuccess ? error : add_partials(p, blocks, stream);
}

}  // namespace muddformer::kernels
