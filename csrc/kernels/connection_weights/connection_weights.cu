// Checks and dispatch of the connection weights, and the last sums of their backward:
//
//   dW1[k, d] = scale[d] P[k, d],  dscale[d] = sum_k W1[k, d] P[k, d],  P = sum of the splits
//   dW2 and dprior: sums over the groups of tokens
//
// One launch: the first blocks serve W1, a thread four columns of a row of P, a block 256 columns
// of kReduceRows rows; then come the blocks of W2 and of the prior.
#include <algorithm>

#include "../common/cluster.cuh"
#include "../common/gelu.cuh"
#include "../common/launch.h"
#include "connection_weights.h"
#include "launch.h"

namespace muddformer::kernels {
namespace {

constexpr int kReduceRows = 4;
constexpr int kReduceColumns = 64;  // vectors of four
constexpr int kSumColumns = 32;
constexpr int kSumLanes = 8;
constexpr int kSumThreads = kSumColumns * kSumLanes;
static_assert(kSumThreads == kReduceRows * kReduceColumns);

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

// Four columns of a row of P a thread.
template <typename T>
__device__ __forceinline__ void reduce_w1(const ConnectionWeightsReduce& p, int64_t block) {
  __shared__ float4 rows[kReduceRows][kReduceColumns];
  const int64_t dim = p.shape.dim,
                blocks_a_row = (dim + 4 * kReduceColumns - 1) / (4 * kReduceColumns);
  const int x = threadIdx.x % kReduceColumns, y = threadIdx.x / kReduceColumns;
  const int64_t column = (block % blocks_a_row * kReduceColumns + x) * 4;
  const int64_t row = block / blocks_a_row * kReduceRows + y;
  const bool inside = column < dim && row < p.shape.hidden;
  const int64_t offset = row * dim + column, size = p.shape.hidden * dim;
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
  rows[y][x] = term;
  __syncthreads();
  if (y != 0 || column >= dim) return;
#pragma unroll
  for (int i = 1; i < kReduceRows; ++i) {
    const float4 v = rows[i][x];
    term = {term.x + v.x, term.y + v.y, term.z + v.z, term.w + v.w};
  }
  *reinterpret_cast<float4*>(p.scale_partials + block / blocks_a_row * dim + column) = term;
}

// Sums over rows: of a block 32 x V columns by 8 lanes over the rows.
template <int V, typename T>
__device__ __forceinline__ void sum_rows(const float* partials, int64_t rows, int64_t columns,
                                         T* out, int64_t block) {
  __shared__ float lanes[kSumLanes][kSumColumns][V];
  const int x = threadIdx.x % kSumColumns, y = threadIdx.x / kSumColumns;
  const int64_t column = (block * kSumColumns + x) * V;
  float sum[V] = {};
  if (column < columns) {
#pragma unroll 4
    for (int64_t row = y; row < rows; row += kSumLanes) {
      const float* from = partials + row * columns + column;
      if constexpr (V == 4) {
        const float4 v = *reinterpret_cast<const float4*>(from);
        sum[0] += v.x;
        sum[1] += v.y;
        sum[2] += v.z;
        sum[3] += v.w;
      } else {
        sum[0] += *from;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) lanes[y][x][j] = sum[j];
  __syncthreads();
  if (y != 0 || column >= columns) return;
#pragma unroll
  for (int j = 0; j < V; ++j) {
#pragma unroll
    for (int i = 1; i < kSumLanes; ++i) sum[j] += lanes[i][x][j];
    out[column + j] = narrow<T>(sum[j]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kSumThreads) sum_rows_kernel(const SumRows p) {
  sum_rows<1>(p.partials, p.rows, p.columns, static_cast<T*>(p.out), blockIdx.x);
}

template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    reduce_kernel(const ConnectionWeightsReduce p, int64_t w1_blocks, int64_t w2_blocks) {
  wait_for_kernel_before();
  const int64_t block = blockIdx.x, outputs = p.shape.outputs;
  if (block < w1_blocks) {
    reduce_w1<T>(p, block);
  } else if (block < w1_blocks + w2_blocks) {
    sum_rows<4>(p.w2_partials, p.groups, outputs * p.shape.hidden, static_cast<T*>(p.dw2),
                block - w1_blocks);
  } else if (p.prior_float32) {
    sum_rows<1>(p.prior_partials, p.groups, outputs, static_cast<float*>(p.dprior),
                block - w1_blocks - w2_blocks);
  } else {
    sum_rows<1>(p.prior_partials, p.groups, outputs, static_cast<T*>(p.dprior),
                block - w1_blocks - w2_blocks);
  }
}

int64_t sum_blocks(int64_t columns, int at_once = 1) {
  return (columns + kSumColumns * at_once - 1) / (kSumColumns * at_once);
}

}  // namespace

int hidden_slabs(int hidden) {
  return (hidden + kSlab - 1) / kSlab;
}

cudaError_t hidden_backward_groups(int64_t tokens, int64_t& groups) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error == cudaSuccess) {
    groups = hidden_backward_groups(tokens, device.bulk_copy ? kHiddenCluster : 1);
  }
  return error;
}

int reduce_rows(int hidden) {
  return (hidden + kReduceRows - 1) / kReduceRows;
}

bool connection_weights_supported(const ConnectionWeightsShape& shape) {
  Device device;
  if (!valid(shape) || current_device(device) != cudaSuccess) return false;
  const int bytes =
      std::max({forward_shared_bytes(shape.hidden), hidden_backward_shared_bytes(shape.outputs),
                input_backward_shared_bytes(shape.hidden)});
  // The widest hidden rows need clusters.
  return bytes <= device.shared_bytes && (device.bulk_copy || padded_hidden(shape.hidden) <= 256);
}

cudaError_t input_backward_splits(const ConnectionWeightsShape& shape, int& splits) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const int64_t columns = input_columns(shape.hidden);
  const int blocks = input_blocks(shape, device);
  const int64_t slices = (shape.dim + columns - 1) / columns;
  const int64_t tiles = (shape.tokens + 64 * blocks - 1) / (64 * blocks);
  splits = static_cast<int>(std::clamp<int64_t>(device.multiprocessors / (slices * blocks), 1,
                                                std::max<int64_t>(tiles, 1)));
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
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  if (!p.plain && on_hopper(p.shape, device)) return weights_forward_hopper(p, device, stream);
  return p.shape.dtype == DType::BFloat16 ? weights_forward<__nv_bfloat16>(p, device, stream)
                                          : weights_forward<__half>(p, device, stream);
}

cudaError_t launch_connection_weights_hidden_backward(const ConnectionWeightsHiddenBackward& p,
                                                      cudaStream_t stream) {
  if (!valid(p.shape)) return cudaErrorInvalidValue;
  if (p.shape.tokens == 0) return cudaSuccess;
  if (!aligned(p.w2) || !aligned(p.hidden) || !aligned(p.grad_hidden) || !aligned(p.w2_partials)) {
    return cudaErrorMisalignedAddress;
  }
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  return p.shape.dtype == DType::BFloat16
             ? weights_hidden_backward<__nv_bfloat16>(p, device, stream)
             : weights_hidden_backward<__half>(p, device, stream);
}

cudaError_t launch_connection_weights_input_backward(const ConnectionWeightsInputBackward& p,
                                                     cudaStream_t stream) {
  if (!valid(p.shape) || p.splits < 1) return cudaErrorInvalidValue;
  if (p.shape.tokens == 0) return cudaSuccess;
  if (!aligned(p.x) || !aligned(p.grad_x) || !aligned(p.w1) || !aligned(p.grad_hidden) ||
      !aligned(p.dx) || !aligned(p.w1_partials)) {
    return cudaErrorMisalignedAddress;
  }
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  if (!p.plain && on_hopper(p.shape, device)) {
    return weights_input_backward_hopper(p, device, stream);
  }
  return p.shape.dtype == DType::BFloat16 ? weights_input_backward<__nv_bfloat16>(p, device, stream)
                                          : weights_input_backward<__half>(p, device, stream);
}

cudaError_t launch_connection_weights_reduce(const ConnectionWeightsReduce& p,
                                             cudaStream_t stream) {
  const ConnectionWeightsShape& s = p.shape;
  if (!valid(s) || (p.w1_partials != nullptr && p.splits < 1) || p.groups < 0) {
    return cudaErrorInvalidValue;
  }
  if (!aligned(p.w1_partials) || !aligned(p.dw1) || !aligned(p.w1) || !aligned(p.w2_partials)) {
    return cudaErrorMisalignedAddress;
  }
  const int64_t width = 4 * kReduceColumns;
  const int64_t w1_blocks =
      p.w1_partials != nullptr ? (s.dim + width - 1) / width * reduce_rows(s.hidden) : 0;
  const int64_t w2_blocks =
      p.w2_partials != nullptr ? sum_blocks(int64_t{s.outputs} * s.hidden, 4) : 0;
  const int64_t blocks = w1_blocks + w2_blocks + (p.dprior != nullptr ? sum_blocks(s.outputs) : 0);
  if (blocks == 0) return cudaSuccess;
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const auto kernel =
      s.dtype == DType::BFloat16 ? reduce_kernel<__nv_bfloat16> : reduce_kernel<__half>;
  return launch_wide(kernel, device, blocks, 1, kSumThreads, 0, stream, p, w1_blocks, w2_blocks);
}

cudaError_t launch_sum_rows(const SumRows& p, cudaStream_t stream) {
  if (p.columns < 1) return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>(sum_blocks(p.columns));
  switch (p.dtype) {
    case DType::Float32:
      sum_rows_kernel<float><<<blocks, kSumThreads, 0, stream>>>(p);
      break;
    case DType::BFloat16:
      sum_rows_kernel<__nv_bfloat16><<<blocks, kSumThreads, 0, stream>>>(p);
      break;
    case DType::Float16:
      sum_rows_kernel<__half><<<blocks, kSumThreads, 0, stream>>>(p);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace muddformer::kernels
