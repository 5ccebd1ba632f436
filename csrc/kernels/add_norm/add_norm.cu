// See add_norm.h for the formula, rows.cuh for how rows are split over threads.
//
// The backward's blocks stay, one on each multiprocessor, and walk over the rows, so that each
// thread keeps the sums of dw and db of its columns in registers. It asks early for the rows that
// come next, into places of its own in shared memory.
#include <algorithm>

#include "../common/cluster.cuh"
#include "../common/device.h"
#include "../common/launch.h"
#include "../common/partial_sums.h"
#include "add_norm.h"
#include "rows.cuh"

namespace muddformer::kernels {
namespace {

constexpr int kForwardThreads = 256, kBackwardThreads = 512;
constexpr int kForwardPacks = 4, kBackwardPacks = 2;  // of a thread
constexpr int kStages = 2;                            // of the backward, where there is room

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
  PackBits<X, E> x[V];
  PackBits<S, E> sum[V];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const int pack = threadIdx.x + k * blockDim.x;
    if (pack >= packs) break;
    x[k] = load_bits<X, E>(from_x + pack * E);
    sum[k] = load_bits<S, E>(from_residual + pack * E);
  }
  float total[1] = {0.0f};
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const int pack = threadIdx.x + k * blockDim.x;
    if (pack >= packs) break;
    float terms[E], sums[E];
    unpack_bits<X, E>(x[k], terms);
    unpack_bits<S, E>(sum[k], sums);
#pragma unroll
    for (int i = 0; i < E; ++i) sums[i] += terms[i];
    sum[k] = pack_bits<S, E>(sums);
    store_bits<S, E>(to_sum + pack * E, sum[k]);
    unpack_bits<S, E>(sum[k], sums);
#pragma unroll
    for (int i = 0; i < E; ++i) total[0] += kLayer ? sums[i] : sums[i] * sums[i];
  }
  group_sums(total, turn);
  float mean = 0.0f;
  if constexpr (kLayer) {
    mean = total[0] * over_dim;
    total[0] = 0.0f;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (threadIdx.x + k * blockDim.x >= packs) break;
      float sums[E];
      unpack_bits<S, E>(sum[k], sums);
#pragma unroll
      for (int i = 0; i < E; ++i) {
        const float from_mean = sums[i] - mean;
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
    float sums[E], weight[E], bias[E] = {};
    load_parameter<S, E>(p.weight, p.types.wide, pack * E, weight);
    if (kLayer && p.bias != nullptr) load_parameter<S, E>(p.bias, p.types.wide, pack * E, bias);
    unpack_bits<S, E>(sum[k], sums);
#pragma unroll
    for (int i = 0; i < E; ++i) sums[i] = fmaf((sums[i] - mean) * rstd, weight[i], bias[i]);
    store_pack<Y, E>(to_normed + pack * E, sums);
  }
}

// The packs of a row that each thread asks for, in shared memory: [V][threads] of each tensor.
template <typename S, typename Y, int E, int V>
struct Stage {
  static constexpr int kThreadBytes = V * (2 * sizeof(PackBits<S, E>) + sizeof(PackBits<Y, E>));

  __device__ __forceinline__ Stage(unsigned char* shared, int stage, int threads, int thread)
      : threads(threads),
        sum(reinterpret_cast<PackBits<S, E>*>(shared + stage * threads * kThreadBytes) + thread),
        grad_sum(sum + V * threads),
        grad_normed(reinterpret_cast<PackBits<Y, E>*>(grad_sum + V * threads - thread) + thread) {}

  int threads;
  PackBits<S, E>*sum, *grad_sum;
  PackBits<Y, E>* grad_normed;
};

// Adds up what the groups of a block have, in their order, and leaves it for the second pass.
// of_groups: [groups][dim] in shared memory.
template <int E, int V>
__device__ __forceinline__ void leave_partial(const float (&sums)[V][E], float* of_groups,
                                              float* to, int packs) {
  const int dim = packs * E, threads = blockDim.x * blockDim.y;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const int pack = threadIdx.x + k * blockDim.x;
    if (pack >= packs) break;
    store_floats<E>(of_groups + threadIdx.y * dim + pack * E, sums[k]);
  }
  __syncthreads();
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < dim; i += threads) {
    float sum = 0.0f;
#pragma unroll 4
    for (int group = 0; group < blockDim.y; ++group) sum += of_groups[group * dim + i];
    to[i] = sum;
  }
}

template <typename X, typename S, typename Y, int E, int V, bool kLayer>
__global__ void __launch_bounds__(V* E > 16 ? kMaxGroup : kBackwardThreads)
    add_norm_backward_kernel(const AddNormBackward p, int packs, int stages) {
  extern __shared__ __align__(16) unsigned char shared[];
  const float over_dim = 1.0f / static_cast<float>(p.dim);
  const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
  const auto stage_of = [&](int stage) {
    return Stage<S, Y, E, V>(shared, stage, threads, thread);
  };
  const auto ask = [&](int64_t row, int stage) {
    if (row < p.rows) {
      const S* const sum = static_cast<const S*>(p.sum) + row * p.dim;
      const S* const grad_sum = static_cast<const S*>(p.grad_sum) + row * p.grad_sum_stride;
      const Y* const dy = static_cast<const Y*>(p.grad_normed) + row * p.grad_normed_stride;
      const Stage<S, Y, E, V> to = stage_of(stage);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const int pack = threadIdx.x + k * blockDim.x;
        if (pack >= packs) break;
        copy_bits<S, E>(to.sum + k * threads, sum + pack * E);
        copy_bits<Y, E>(to.grad_normed + k * threads, dy + pack * E);
        if (p.grad_sum != nullptr) copy_bits<S, E>(to.grad_sum + k * threads, grad_sum + pack * E);
      }
    }
    copy_commit();
  };

  float grad_weight[V][E] = {}, grad_bias[kLayer ? V : 1][E] = {};
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int stage = 0; stage < stages - 1; ++stage) ask(begin + stage * step, stage);
  float next_rstd = 0.0f, next_mean = 0.0f;
  if (begin < p.rows) {
    next_rstd = __ldg(p.rstd + begin);
    if constexpr (kLayer) next_mean = __ldg(p.mean + begin);
  }
  int turn = 0, stage = 0;
  for (int64_t row = begin; row < p.rows; row += step) {
    ask(row + (stages - 1) * step, stage == 0 ? stages - 1 : stage - 1);
    const float rstd = next_rstd, mean = next_mean;
    if (row + step < p.rows) {
      next_rstd = __ldg(p.rstd + row + step);
      if constexpr (kLayer) next_mean = __ldg(p.mean + row + step);
    }
    copy_wait(stages - 1);
    const Stage<S, Y, E, V> from = stage_of(stage);
    float means[kLayer ? 2 : 1] = {};  // of g n, and of g
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const int pack = threadIdx.x + k * blockDim.x;
      if (pack >= packs) break;
      float weight[E], n[E], dy[E];
      load_parameter<S, E>(p.weight, p.types.wide, pack * E, weight);
      unpack_bits<S, E>(from.sum[k * threads], n);
      unpack_bits<Y, E>(from.grad_normed[k * threads], dy);
#pragma unroll
      for (int i = 0; i < E; ++i) {
        n[i] = (n[i] - mean) * rstd;
        grad_weight[k][i] = fmaf(dy[i], n[i], grad_weight[k][i]);
        if constexpr (kLayer) grad_bias[k][i] += dy[i];
        dy[i] *= weight[i];
        means[0] = fmaf(dy[i], n[i], means[0]);
        if constexpr (kLayer) means[1] += dy[i];
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
      float weight[E], n[E], dy[E], ds[E] = {};
      load_parameter<S, E>(p.weight, p.types.wide, pack * E, weight);
      unpack_bits<S, E>(from.sum[k * threads], n);
      unpack_bits<Y, E>(from.grad_normed[k * threads], dy);
      if (p.grad_sum != nullptr) unpack_bits<S, E>(from.grad_sum[k * threads], ds);
#pragma unroll
      for (int i = 0; i < E; ++i) {
        n[i] = (n[i] - mean) * rstd;
        ds[i] = fmaf(rstd, dy[i] * weight[i] - level - n[i] * along, ds[i]);
      }
      const int64_t at = row * p.dim + pack * E;
      store_pack<S, E>(static_cast<S*>(p.grad_residual) + at, ds);
      if constexpr (!std::is_same_v<X, S>) {
        store_pack<X, E>(static_cast<X*>(p.grad_x) + at, ds);
      }
    }
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
  let_next_kernel_come();
  float* const of_groups = reinterpret_cast<float*>(shared);
  float* const to = p.workspace + static_cast<int64_t>(blockIdx.x) * (kLayer ? 2 : 1) * p.dim;
  leave_partial<E, V>(grad_weight, of_groups, to, packs);
  if constexpr (kLayer) leave_partial<E, V>(grad_bias, of_groups, to + p.dim, packs);
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

Groups split(const AddNorm&, int packs, int most) {
  return split_rows(packs, kForwardPacks, most, kForwardThreads);
}

Groups split(const AddNormBackward&, int packs, int most) {
  return split_rows(packs, kBackwardPacks, most, kBackwardThreads);
}

template <typename X, typename S, typename Y, int E, int V, bool kLayer>
cudaError_t launch(const AddNorm& p, int packs, const Groups& groups, const Device&,
                   cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((p.rows + groups.rows - 1) / groups.rows);
  add_norm_kernel<X, S, Y, E, V, kLayer>
      <<<blocks, dim3(groups.threads, groups.rows), 0, stream>>>(p, packs);
  return cudaGetLastError();
}

template <typename X, typename S, typename Y, int E, int V, bool kLayer>
cudaError_t launch(const AddNormBackward& p, int packs, const Groups& groups, const Device& device,
                   cudaStream_t stream) {
  // A stage has more bytes of a row than its sums, which follow it there; 1 KB is the kernel's own.
  const int room = device.shared_bytes - 1024;
  const int stage_bytes = groups.threads * Stage<S, Y, E, V>::kThreadBytes;
  const int rows = std::clamp(room / (kStages * stage_bytes), 1, groups.rows);
  const int stages = std::clamp(room / (rows * stage_bytes), 1, kStages);
  const int shared_bytes = rows * stages * stage_bytes;
  const int64_t blocks = std::min<int64_t>((p.rows + rows - 1) / rows, device.multiprocessors);
  const auto kernel = add_norm_backward_kernel<X, S, Y, E, V, kLayer>;
  cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), dim3(groups.threads, rows), shared_bytes, stream>>>(
      p, packs, stages);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const int64_t stride = (kLayer ? 2 : 1) * p.dim;
  const auto count = static_cast<int>(blocks);
  PartialSums sums{};
  sums.sums[0] = {p.workspace, stride, count, p.grad_weight};
  if (kLayer) sums.sums[1] = {p.workspace + p.dim, stride, count, p.grad_bias};
  sums.dim = static_cast<int>(p.dim);
  sums.dtype = p.types.wide ? DType::Float32 : p.types.sum;
  return launch_partial_sums(sums, device, stream);
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
