// See add_norm.h for the formula, rows.cuh for how rows are split over threads. A row is in
// registers from its loads to its stores.
//
// The backward's blocks stay, one on each multiprocessor, and walk over the rows, so that each
// thread keeps the sums of dw and db of its columns in registers.
#include <algorithm>

#include "../common/device.h"
#include "../common/launch.h"
#include "../common/partial_sums.h"
#include "add_norm.h"
#include "rows.cuh"

namespace muddformer::kernels {
namespace {

constexpr int kForwardThreads = 256, kBackwardThreads = 640;

template <typename X, typename S, typename Y, int E, int V, bool kLayer>
__global__ void __launch_bounds__(kMaxGroup) add_norm_kernel(const AddNorm p, int packs) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;
  const X* const from_x = static_cast<const X*>(p.x) + row * p.x_stride;
  const S* const from_residual = static_cast<const S*>(p.residual) + row * p.residual_stride;
  S* const to_sum = static_cast<S*>(p.sum) + row * p.dim;
  Y* const to_normed = static_cast<Y*>(p.normed) + row * p.dim;
  const float over_dim = 1.0f / static_cast<float>(p.dim);
  int turn = 0;
  float x[V][E], sum[V][E];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const int pack = threadIdx.x + k * blockDim.x;
    if (pack >= packs) break;
    load_pack<X, E>(from_x + pack * E, x[k]);
    load_pack<S, E>(from_residual + pack * E, sum[k]);
  }
  float total[1] = {0.0f};
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const int pack = threadIdx.x + k * blockDim.x;
    if (pack >= packs) break;
#pragma unroll
    for (int i = 0; i < E; ++i) {
      sum[k][i] = widen(narrow<S>(sum[k][i] + x[k][i]));
      total[0] += kLayer ? sum[k][i] : sum[k][i] * sum[k][i];
    }
    store_pack<S, E>(to_sum + pack * E, sum[k]);
  }
  group_sums(total, turn);
  float mean = 0.0f;
  if constexpr (kLayer) {
    mean = total[0] * over_dim;
    total[0] = 0.0f;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (threadIdx.x + k * blockDim.x >= packs) break;
#pragma unroll
      for (int i = 0; i < E; ++i) {
        const float from_mean = sum[k][i] - mean;
        total[0] = fmaf(from_mean, from_mean, total[0]);
      }
    }
    group_sums(total, turn);
  }
  const float rstd = rsqrtf(total[0] * over_dim + p.eps);
  if (threadIdx.x == 0) {
    p.rstd[row] = rstd;
    if constexpr (kLayer) p.mean[row] = mean;
  }
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const int pack = threadIdx.x + k * blockDim.x;
    if (pack >= packs) break;
    float weight[E], bias[E] = {};
    load_parameter<S, E>(p.weight, p.types.wide, pack * E, weight);
    if (kLayer && p.bias != nullptr) load_parameter<S, E>(p.bias, p.types.wide, pack * E, bias);
#pragma unroll
    for (int i = 0; i < E; ++i) {
      sum[k][i] = fmaf((sum[k][i] - mean) * rstd, weight[i], bias[i]);
    }
    store_pack<Y, E>(to_normed + pack * E, sum[k]);
  }
}

// Adds up what the groups of a block have, in their order, and leaves it for the second pass.
template <int E, int V>
__device__ __forceinline__ void leave_partial(const float (&sums)[V][E], float* to, int packs) {
  extern __shared__ float of_block[];
  for (int group = 0; group < blockDim.y; ++group) {
    if (threadIdx.y == group) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const int pack = threadIdx.x + k * blockDim.x;
        if (pack >= packs) break;
#pragma unroll
        for (int i = 0; i < E; ++i) {
          float& sum = of_block[pack * E + i];
          sum = group == 0 ? sums[k][i] : sum + sums[k][i];
          if (group == blockDim.y - 1) to[pack * E + i] = sum;
        }
      }
    }
    __syncthreads();
  }
}

template <typename X, typename S, typename Y, int E, int V, bool kLayer>
__global__ void __launch_bounds__(V* E > 16 ? kMaxGroup : kBackwardThreads)
    add_norm_backward_kernel(const AddNormBackward p, int packs) {
  const float over_dim = 1.0f / static_cast<float>(p.dim);
  int turn = 0;
  float grad_weight[V][E] = {}, grad_bias[kLayer ? V : 1][E] = {};
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t first = row * p.dim;
    const Y* const from_dy = static_cast<const Y*>(p.grad_normed) + row * p.grad_normed_stride;
    const S* const from_ds = static_cast<const S*>(p.grad_sum) + row * p.grad_sum_stride;
    const float rstd = __ldg(p.rstd + row), mean = kLayer ? __ldg(p.mean + row) : 0.0f;
    float n[V][E], dy[V][E], ds[V][E];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const int pack = threadIdx.x + k * blockDim.x;
      if (pack >= packs) break;
      load_pack<S, E>(static_cast<const S*>(p.sum) + first + pack * E, n[k]);
      load_pack<Y, E>(from_dy + pack * E, dy[k]);
      if (p.grad_sum != nullptr) {
        load_pack<S, E>(from_ds + pack * E, ds[k]);
      } else {
#pragma unroll
        for (int i = 0; i < E; ++i) ds[k][i] = 0.0f;
      }
    }
    float means[kLayer ? 2 : 1] = {};  // of g n, and of g
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const int pack = threadIdx.x + k * blockDim.x;
      if (pack >= packs) break;
      float weight[E];
      load_parameter<S, E>(p.weight, p.types.wide, pack * E, weight);
#pragma unroll
      for (int i = 0; i < E; ++i) {
        n[k][i] = (n[k][i] - mean) * rstd;
        grad_weight[k][i] = fmaf(dy[k][i], n[k][i], grad_weight[k][i]);
        if constexpr (kLayer) grad_bias[k][i] += dy[k][i];
        dy[k][i] *= weight[i];
        means[0] = fmaf(dy[k][i], n[k][i], means[0]);
        if constexpr (kLayer) means[1] += dy[k][i];
      }
    }
    group_sums(means, turn);
    const float along = means[0] * over_dim;
    float level = 0.0f;
    if constexpr (kLayer) level = means[1] * over_dim;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const int pack = threadIdx.x + k * blockDim.x;
      if (pack >= packs) break;
#pragma unroll
      for (int i = 0; i < E; ++i) {
        ds[k][i] = fmaf(rstd, dy[k][i] - level - n[k][i] * along, ds[k][i]);
      }
      store_pack<S, E>(static_cast<S*>(p.grad_residual) + first + pack * E, ds[k]);
      if constexpr (!std::is_same_v<X, S>) {
        store_pack<X, E>(static_cast<X*>(p.grad_x) + first + pack * E, ds[k]);
      }
    }
  }
  float* const to = p.workspace + static_cast<int64_t>(blockIdx.x) * (kLayer ? 2 : 1) * p.dim;
  leave_partial<E, V>(grad_weight, to, packs);
  if constexpr (kLayer) leave_partial<E, V>(grad_bias, to + p.dim, packs);
}

// Whether rows are whole packs of E entries wherever they begin.
template <typename... Strides>
bool whole_packs(int entries, Strides... strides) {
  return ((strides % entries == 0) && ...);
}

bool has_packs(const AddNorm& p, int entries) {
  const void* const pointers[] = {p.x, p.residual, p.weight, p.bias, p.sum, p.normed};
  return aligned(pointers, 6) && whole_packs(entries, p.dim, p.x_stride, p.residual_stride);
}

bool has_packs(const AddNormBackward& p, int entries) {
  const void* const pointers[] = {p.grad_sum, p.grad_normed,   p.sum,
                                  p.weight,   p.grad_residual, p.grad_x};
  return aligned(pointers, 6) &&
         whole_packs(entries, p.dim, p.grad_sum_stride, p.grad_normed_stride);
}

int64_t blocks_of(const AddNorm& p, const Groups& groups, const Device&) {
  return (p.rows + groups.rows - 1) / groups.rows;
}

int64_t blocks_of(const AddNormBackward& p, const Groups& groups, const Device& device) {
  return std::min<int64_t>((p.rows + groups.rows - 1) / groups.rows, device.multiprocessors);
}

// Packs of a thread: those of a backward are in registers three times.
Groups split(const AddNorm&, int packs, int most) {
  return split_rows(packs, 4, most, kForwardThreads);
}

Groups split(const AddNormBackward&, int packs, int most) {
  return split_rows(packs, 2, most, kBackwardThreads);
}

template <typename X, typename S, typename Y, int E, int V, bool kLayer>
cudaError_t launch(const AddNorm& p, int packs, const Groups& groups, const Device& device,
                   cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(blocks_of(p, groups, device));
  add_norm_kernel<X, S, Y, E, V, kLayer>
      <<<blocks, dim3(groups.threads, groups.rows), 0, stream>>>(p, packs);
  return cudaGetLastError();
}

template <typename X, typename S, typename Y, int E, int V, bool kLayer>
cudaError_t launch(const AddNormBackward& p, int packs, const Groups& groups, const Device& device,
                   cudaStream_t stream) {
  const int64_t blocks = blocks_of(p, groups, device);
  const auto shared_bytes = static_cast<size_t>(p.dim) * sizeof(float);
  const auto kernel = add_norm_backward_kernel<X, S, Y, E, V, kLayer>;
  if (shared_bytes > 44 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), dim3(groups.threads, groups.rows), shared_bytes,
           stream>>>(p, packs);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || (p.grad_weight == nullptr && p.grad_bias == nullptr)) return error;
  PartialSums sums{};
  sums.partial = p.workspace;
  sums.to[0] = p.grad_weight;
  sums.to[1] = p.grad_bias;
  sums.slots = kLayer ? 2 : 1;
  sums.blocks = static_cast<int>(blocks);
  sums.dim = static_cast<int>(p.dim);
  sums.dtype = p.types.wide ? DType::Float32 : p.types.sum;
  return launch_partial_sums(sums, stream);
}

template <typename X, typename S, typename Y, int E, bool kLayer, typename Args>
cudaError_t with_packs(const Args& p, const Device& device, cudaStream_t stream) {
  const int packs = static_cast<int>(p.dim) / E;
  constexpr int kMost = E == 1 ? 8 : 4;
  const Groups groups = split(p, packs, kMost);
  switch (groups.packs_each) {
    case 8:
      if constexpr (kMost < 8) return cudaErrorNotSupported;
      return launch<X, S, Y, E, kMost, kLayer>(p, packs, groups, device, stream);
    case 4:
      return launch<X, S, Y, E, 4, kLayer>(p, packs, groups, device, stream);
    case 2:
      return launch<X, S, Y, E, 2, kLayer>(p, packs, groups, device, stream);
    case 1:
      return launch<X, S, Y, E, 1, kLayer>(p, packs, groups, device, stream);
    default:
      return cudaErrorNotSupported;
  }
}

template <typename X, typename S, typename Y, typename Args>
cudaError_t with_types(const Args& p, const Device& device, cudaStream_t stream) {
  constexpr int E = kVector<S>;
  if (has_packs(p, E)) {
    return p.layer ? with_packs<X, S, Y, E, true>(p, device, stream)
                   : with_packs<X, S, Y, E, false>(p, device, stream);
  }
  return p.layer ? with_packs<X, S, Y, 1, true>(p, device, stream)
                 : with_packs<X, S, Y, 1, false>(p, device, stream);
}

template <typename Args>
cudaError_t dispatch(const Args& p, cudaStream_t stream) {
  if (p.rows < 0 || p.dim < 1) return cudaErrorInvalidValue;
  if (p.dim > kMaxDim) return cudaErrorNotSupported;
  Device device{};
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const auto are = [&p](DType x, DType sum, DType normed) {
    return p.types.x == x && p.types.sum == sum && p.types.normed == normed;
  };
  using B = __nv_bfloat16;
  using H = __half;
  constexpr DType f = DType::Float32, b = DType::BFloat16, h = DType::Float16;
  if (are(f, f, f)) return with_types<float, float, float>(p, device, stream);
  if (are(b, b, b)) return with_types<B, B, B>(p, device, stream);
  if (are(h, h, h)) return with_types<H, H, H>(p, device, stream);
  if (are(b, f, b)) return with_types<B, float, B>(p, device, stream);
  if (are(h, f, h)) return with_types<H, float, H>(p, device, stream);
  return cudaErrorNotSupported;
}

}  // namespace

cudaError_t add_norm_workspace(const AddNormBackward& p, int64_t& floats) {
  Device device{};
  const cudaError_t error = current_device(device);
  floats = int64_t{device.multiprocessors} * (p.layer ? 2 : 1) * p.dim;
  return error;
}

cudaError_t launch_add_norm(const AddNorm& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return dispatch(p, stream);
}

cudaError_t launch_add_norm_backward(const AddNormBackward& p, cudaStream_t stream) {
  return dispatch(p, stream);
}

}  // namespace muddformer::kernels
