// Checks and dispatch of the connection weights, and the last sums of their backward:
//
//   dW1[k, d] = scale[d] P[k, d],  dscale[d] = sum_k W1[k, d] P[k, d],  P = sum of the splits
//
// A thread owns four columns of a row of P; a block 256 columns of kReduceRows rows.
#include <algorithm>

#include "connection_weights.h"
#include "connection_weights_gelu.cuh"
#include "connection_weights_launch.h"
#include "plan.h"

namespace muddformer::kernels {
namespace {

constexpr int kReduceRows = 4;
constexpr int kReduceColumns = 64;  // vectors of four
constexpr int kSumColumns = 32;
constexpr int kSumLanes = 8;

bool valid(const ConnectionWeightsShape& s) {
  return (s.dtype == DType::BFloat16 || s.dtype == DType::Float16) && s.tokens >= 0 && s.dim >= 8 &&
         s.dim <= INT_MAX / 2 && s.dim % 8 == 0 && s.hidden >= 8 && s.hidden <= kMaxHidden &&
         s.hidden % 8 == 0 && s.outputs >= 1 && s.outputs <= kMaxOutputs && s.cap >= 0;
}

template <typename T>
__device__ __forceinline__ float4 load_four(const T* from) {
  const uint2 bits = *reinterpret_cast<const uint2*>(from);
  float v[4];
  unpack_word<T>(bits.x, v);
  unpack_word<T>(bits.y, v + 2);
  return {v[0], v[1], v[2], v[3]};
}

template <typename T>
__global__ void __launch_bounds__(kReduceRows* kReduceColumns)
    reduce_kernel(const ConnectionWeightsReduce p) {
  __shared__ float4 rows[kReduceRows][kReduceColumns];
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kReduceColumns + threadIdx.x) * 4;
  const int row = blockIdx.y * kReduceRows + threadIdx.y;
  const bool inside = column < p.dim && row < p.hidden;
  const int64_t offset = row * p.dim + column, size = p.hidden * p.dim;
  float sum[4] = {};
  if (inside) {
#pragma unroll 8
    for (int s = 0; s < p.splits; ++s) {
      const float4 v = *reinterpret_cast<const float4*>(p.w1_partials + s * size + offset);
      sum[0] += v.x;
      sum[1] += v.y;
      sum[2] += v.z;
      sum[3] += v.w;
    }
    float out[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float scale =
          p.scale != nullptr ? load_mixed<T>(p.scale, column + j, p.scale_float32) : 1.0f;
      out[j] = sum[j] * scale;
    }
    *reinterpret_cast<uint2*>(static_cast<T*>(p.dw1) + offset) = {pack_word<T>(out),
                                                                  pack_word<T>(out + 2)};
  }
  if (p.scale_partials == nullptr) return;
  float4 term{};
  if (inside) {
    const float4 w = load_four(static_cast<const T*>(p.w1) + offset);
    term = {w.x * sum[0], w.y * sum[1], w.z * sum[2], w.w * sum[3]};
  }
  rows[threadIdx.y][threadIdx.x] = term;
  __syncthreads();
  if (threadIdx.y != 0 || column >= p.dim) return;
#pragma unroll
  for (int y = 1; y < kReduceRows; ++y) {
    const float4 v = rows[y][threadIdx.x];
    term = {term.x + v.x, term.y + v.y, term.z + v.z, term.w + v.w};
  }
  *reinterpret_cast<float4*>(p.scale_partials + blockIdx.y * p.dim + column) = term;
}

// A block of 32 columns x 8 lanes over the rows.
template <typename T>
__global__ void __launch_bounds__(kSumColumns* kSumLanes) sum_rows_kernel(const SumRows p) {
  __shared__ float lanes[kSumLanes][kSumColumns];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  float sum = 0;
  if (column < p.columns) {
#pragma unroll 8
    for (int64_t row = threadIdx.y; row < p.rows; row += kSumLanes) {
      sum += p.partials[row * p.columns + column];
    }
  }
  lanes[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= p.columns) return;
#pragma unroll
  for (int y = 1; y < kSumLanes; ++y) sum += lanes[y][threadIdx.x];
  static_cast<T*>(p.out)[column] = narrow<T>(sum);
}

}  // namespace

int64_t hidden_backward_blocks(int64_t tokens) {
  return (tokens + 63) / 64;
}

int reduce_rows(int hidden) {
  return (hidden + kReduceRows - 1) / kReduceRows;
}

bool connection_weights_supported(const ConnectionWeightsShape& shape) {
  WeightsDevice device;
  if (!valid(shape) || current_device(device) != cudaSuccess) return false;
  const int bytes = std::max({forward_shared_bytes(shape.hidden),
                              hidden_backward_shared_bytes(shape.hidden, shape.outputs),
                              input_backward_shared_bytes(shape.hidden)});
  // The widest hidden rows need clusters.
  return bytes <= device.shared_bytes && (device.bulk_copy || padded_hidden(shape.hidden) <= 256);
}

cudaError_t input_backward_splits(const ConnectionWeightsShape& shape, int& splits) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const int64_t columns = input_columns(shape.hidden);
  const int64_t slices = (shape.dim + columns - 1) / columns;
  const int64_t tiles = (shape.tokens + 63) / 64;
  splits = static_cast<int>(
      std::clamp<int64_t>(device.multiprocessors / slices, 1, std::max<int64_t>(tiles, 1)));
  return cudaSuccess;
}

cudaError_t launch_connection_weights_forward(const ConnectionWeightsForward& p,
                                              cudaStream_t stream) {
  const bool known_cluster = p.cluster == 0 || p.cluster == 1 || p.cluster == 2 || p.cluster == 4;
  if (!valid(p.shape) || !known_cluster) return cudaErrorInvalidValue;
  if (p.shape.tokens == 0) return cudaSuccess;
  if (!aligned(p.x) || !aligned(p.w1) || !aligned(p.w2) || !aligned(p.hidden)) {
    return cudaErrorMisalignedAddress;
  }
  WeightsDevice device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  return p.shape.dtype == DType::BFloat16 ? weights_forward<__nv_bfloat16>(p, device, stream)
                                          : weights_forward<__half>(p, device, stream);
}

cudaError_t launch_connection_weights_hidden_backward(const ConnectionWeightsHiddenBackward& p,
                                                      cudaStream_t stream) {
  if (!valid(p.shape)) return cudaErrorInvalidValue;
  if (p.shape.tokens == 0) return cudaSuccess;
  if (!aligned(p.w2) || !aligned(p.hidden) || !aligned(p.grad_hidden) || !aligned(p.gelu)) {
    return cudaErrorMisalignedAddress;
  }
  return p.shape.dtype == DType::BFloat16 ? weights_hidden_backward<__nv_bfloat16>(p, stream)
                                          : weights_hidden_backward<__half>(p, stream);
}

cudaError_t launch_connection_weights_input_backward(const ConnectionWeightsInputBackward& p,
                                                     cudaStream_t stream) {
  if (!valid(p.shape) || p.splits < 1) return cudaErrorInvalidValue;
  if (p.shape.tokens == 0) return cudaSuccess;
  if (!aligned(p.x) || !aligned(p.grad_x) || !aligned(p.w1) || !aligned(p.grad_hidden) ||
      !aligned(p.dx) || !aligned(p.w1_partials)) {
    return cudaErrorMisalignedAddress;
  }
  WeightsDevice device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  return p.shape.dtype == DType::BFloat16 ? weights_input_backward<__nv_bfloat16>(p, device, stream)
                                          : weights_input_backward<__half>(p, device, stream);
}

cudaError_t launch_connection_weights_reduce(const ConnectionWeightsReduce& p,
                                             cudaStream_t stream) {
  if (p.hidden < 1 || p.dim < 8 || p.dim % 8 != 0 || p.splits < 1) return cudaErrorInvalidValue;
  const int64_t width = 4 * kReduceColumns;
  const dim3 grid(static_cast<unsigned>((p.dim + width - 1) / width),
                  static_cast<unsigned>(reduce_rows(p.hidden)));
  const dim3 block(kReduceColumns, kReduceRows);
  if (p.dtype == DType::BFloat16) {
    reduce_kernel<__nv_bfloat16><<<grid, block, 0, stream>>>(p);
  } else {
    reduce_kernel<__half><<<grid, block, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

cudaError_t launch_sum_rows(const SumRows& p, cudaStream_t stream) {
  if (p.columns < 1) return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>((p.columns + kSumColumns - 1) / kSumColumns);
  const dim3 block(kSumColumns, kSumLanes);
  switch (p.dtype) {
    case DType::Float32:
      sum_rows_kernel<float><<<blocks, block, 0, stream>>>(p);
      break;
    case DType::BFloat16:
      sum_rows_kernel<__nv_bfloat16><<<blocks, block, 0, stream>>>(p);
      break;
    case DType::Float16:
      sum_rows_kernel<__half><<<blocks, block, 0, stream>>>(p);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace muddformer::kernels
